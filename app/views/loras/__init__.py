"""The LoRAs page: every adapter that Weft knows, and what can be done with it."""
