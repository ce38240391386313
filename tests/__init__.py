"""Tests; none of them asks the Hugging Face hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first imported
