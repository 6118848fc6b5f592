"""``POST /tokenize``, with vLLM's fields."""

from __future__ import annotations

from medusa_runtime.errors import RequestError
from medusa_runtime.server.api import Api
from medusa_runtime.server.chat_prompt import chat_prompt
from medusa_runtime.server.logprobs import token_text
from medusa_runtime.server.schema.answers import Tokens
from medusa_runtime.server.schema.tokenize import TokenizeRequest
from medusa_runtime.server.translate import check_model


def tokenized(api: Api, data: bytes) -> Tokens:
    """The token ids of a text or a chat.

    Args:
        api: What all endpoints share.
        data: The body.

    Raises:
        ApiError: The request is refused; so do pydantic's ``ValidationError`` and ``MedusaError``.
    """
    request = TokenizeRequest.model_validate_json(data)
    check_model(api.settings.names, request.model)
    tokenizer = api.service.tokenizer
    most = api.service.max_tokens
    if tokenizer is None:
        raise RequestError("This model has no tokenizer.")
    if request.messages is not None:
        ids = chat_prompt(
            tokenizer,
            api.form,
            request.messages,
            max_tokens=most,
            tools=request.tools,
            variables=request.chat_template_kwargs,
            opens_answer=request.add_generation_prompt,
        ).token_ids
    else:
        ids = tokenizer.encode(request.prompt or "", add_special_tokens=request.add_special_tokens, max_tokens=most)
    answer: Tokens = {"count": len(ids), "max_model_len": most, "tokens": ids}
    if request.return_token_strs:
        answer["token_strs"] = [token_text(tokenizer, token_id)[0] for token_id in ids]
    return answer
