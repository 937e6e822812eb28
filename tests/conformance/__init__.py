"""PEFT's own tests, run with SpikeLoRA in LoRA's place; `make conformance`."""
