"""How sparse is an adapter, and how is that set? Observing, metering, calibrating, holding, watching, accounting.

The room imports the rooms `method` and `peft`.
"""
