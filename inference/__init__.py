"""Where a base model, its LoRA adapters and text meet torch.

Training evaluates with this package and the tier serves with it, so what is proved is what is served. It knows nothing of
HTTP, tenants, flows or MLflow.
"""
