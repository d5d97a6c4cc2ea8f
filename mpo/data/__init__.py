"""Preference rows in every format the project reads, tokenizers, and batches."""
