"""Tutelage: serve LLM traffic through the cheapest model that is good enough, and grow those models from the traffic itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tutelage.api import APIGateway, DistributedOrchestrator, MultiTenantManager, Request, Response
    from tutelage.distillation import DistillationConfig, KnowledgeDistillation
    from tutelage.self_evolution import SelfEvolutionEngine

__version__ = "0.1.0"
__all__ = [
    "APIGateway",
    "DistillationConfig",
    "DistributedOrchestrator",
    "KnowledgeDistillation",
    "MultiTenantManager",
    "Request",
    "Response",
    "SelfEvolutionEngine",
]


def __getattr__(name: str) -> Any:
    """The Python API, imported when it is first asked for: the command line must not pay for the gateway."""
    if name not in __all__:
        raise AttributeError(f"module 'tutelage' has no attribute {name!r}")
    from importlib import import_module

    where = {"DistillationConfig": "distillation", "KnowledgeDistillation": "distillation", "SelfEvolutionEngine": "self_evolution"}
    return getattr(import_module(f"tutelage.{where.get(name, 'api')}"), name)
