"""The request path: one ASGI app. It refuses to know Prefect, MLflow, training or torch."""
