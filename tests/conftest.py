"""Settings for all tests: no network, and numbers that do not depend on the machine's load."""

import os

# Set before anything imports huggingface_hub: a test that wants a hub runs its own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
