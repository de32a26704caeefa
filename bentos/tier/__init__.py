"""The tier service: one base model with many LoRA adapters behind OpenAI's chat API.

Requests of all adapters share forward passes. While a batch is decoded, new requests wait for the next one.
"""
