"""The body of ``POST /tokenize``."""

from __future__ import annotations

from pydantic import model_validator

from medusa_runtime.server.schema.base import Body, Items, JsonObject
from medusa_runtime.server.schema.chat import Message, Tool


class TokenizeRequest(Body):
    """A request for the token ids of a text or a chat.

    Attributes:
        model: Name of the model.
        prompt: The text.
        messages: The chat, in the place of ``prompt``.
        add_special_tokens: If false, a text gets no tokens that begin and end it.
        add_generation_prompt: If false, a chat does not end with the opening of the next answer.
        return_token_strs: If true, the answer has the text of each token.
        tools: The functions that the model may call.
        chat_template_kwargs: Variables of the chat template.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Items[Message] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    tools: Items[Tool] | None = None
    chat_template_kwargs: JsonObject | None = None

    @model_validator(mode="after")
    def _one_prompt(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self
