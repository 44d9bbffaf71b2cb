"""A check of whether a model that a user passes in is a Skipstone model, which can be measured and decoded here."""

from __future__ import annotations


def require_ours(model: object) -> None:
    """Raise ValueError unless `model` is a Skipstone model that returns one position per given input id.

    A model with PEFT adapters in its layers is accepted. A model wrapped by PEFT for prompt learning is refused,
    because it puts virtual tokens before each text. A decoder of transformers is refused too, even if `skipstone.route`
    has added mechanisms to it.
    """
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)  # type: ignore[union-attr]
        raise ValueError(
            f"the model is wrapped for prompt learning ({kind}), which puts virtual tokens before each text: "
            "logits and decisions do not belong to the given ids; use its own forward and generate"
        )
    got = type(model).__name__
    if hasattr(model, "skipstone_routing"):
        raise ValueError(
            f"expected a Skipstone model, got {got} that skipstone.route has routed in place; it has its own forward "
            "and generate, and its decisions are in the records of what skipstone.route returned"
        )
    if not hasattr(model, "routing_modules"):
        raise ValueError(
            f"expected a Skipstone model, got {got}; skipstone.model.pretrained.load_pretrained converts a "
            "checkpoint of transformers, and skipstone.route puts mechanisms into decoders that it does not convert"
        )
