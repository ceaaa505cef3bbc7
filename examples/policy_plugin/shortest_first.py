"""Serves the waiting call with the shortest prompt first, but none later than its patience."""

from pydantic import BaseModel, ConfigDict, Field

from trimtab.core.hooks import PluginInfo, hookimpl
from trimtab.core.policy import Call, ServingPolicy


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")
    tokens_per_s: float = Field(1000, gt=0, description="prompt tokens worth a second of waiting")


class ShortestFirst(ServingPolicy):
    def __init__(self, options: Options) -> None:
        super().__init__()
        self._tokens_per_s = options.tokens_per_s

    def key(self, call: Call, now_s: float) -> float:
        return call.arrival_s + call.prompt_tokens / self._tokens_per_s


@hookimpl
def trimtab_info() -> PluginInfo:
    enable = '--additional-config \'{"trimtab": {"shortest": {}}}\''
    return PluginInfo(summary="short prompts first", enable=enable, config=Options)


@hookimpl
def trimtab_serving_policy(config: Options) -> ServingPolicy:
    return ShortestFirst(config)
