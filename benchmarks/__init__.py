"""What SpikeLoRA costs, against the frozen base, PEFT's LoRA and a plain transcription of the method; see README.md."""

import os

# Before transformers is imported: every model is built here, nothing is asked for.
os.environ["HF_HUB_OFFLINE"] = "1"
