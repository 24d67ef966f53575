"""Hugging Face folders with safetensors."""
