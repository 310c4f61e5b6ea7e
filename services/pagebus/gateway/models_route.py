"""`GET /v1/models` and `/v1/models/{id}`: the served names with the context's length."""

from pagebus.gateway.answer_types import ModelCard, ModelList
from pagebus.gateway.context import GatewayContext
from pagebus.gateway.limits import Receive, Scope, Send
from pagebus.gateway.responder import Endpoint, send_json


class ModelsEndpoint(Endpoint):
    """The list, or one card where the route has a `model_id` (which may hold slashes)."""

    def __init__(self, context: GatewayContext) -> None:
        self._context = context

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the list or a card."""
        model_id: str | None = scope.get("path_params", {}).get("model_id")
        if model_id is None:
            await send_json(send, 200, ModelList([self._card(name) for name in self._context.served_names]))
        else:
            await send_json(send, 200, self._card(self._context.checked_model(model_id)))

    def _card(self, name: str) -> ModelCard:
        return ModelCard(
            id=name,
            created=self._context.created,
            max_model_len=self._context.generations.max_model_len or None,
        )
