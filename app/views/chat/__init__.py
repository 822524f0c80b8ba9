"""The Chat page: conversations, a streaming transcript, a composer and a side panel."""
