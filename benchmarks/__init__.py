"""What SpikeLoRA costs, against the frozen base, PEFT's LoRA and a plain transcription of the method; see README.md."""

import os

# Before transformers is imported: every model is built here, and nothing is downloaded.
os.environ["HF_HUB_OFFLINE"] = "1"
