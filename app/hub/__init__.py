"""Fetching models and adapters from a Hugging Face hub: names, listings, and bytes under our own control.

Metadata goes through huggingface_hub; the bytes of files through urllib3, because huggingface_hub neither resumes
across runs nor checks a sha256 over plain HTTP.
"""
