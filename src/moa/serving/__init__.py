"""The vLLM plugin: a plan served from vLLM's pages.

    text ─► vLLM's scheduler ─► SpanManager (which pages a request holds) ─► model ─► span attention over those pages

vLLM is imported by nothing but the modules here, and by those only where they run in it.
"""


def register() -> None:
    """Entry point of vLLM's plugins: name the architecture that serves a plan."""
    from vllm import ModelRegistry

    ModelRegistry.register_model("MoAForCausalLM", "moa.serving.model:MoAForCausalLM")
