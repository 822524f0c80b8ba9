"""The Train page: what is trained on what, the run as it goes, and the runs there were."""
