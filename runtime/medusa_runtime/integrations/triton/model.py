"""The model that Triton's Python backend loads: a service, and an event loop in a thread that answers requests."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from medusa_runtime.integrations.settings import read_fields
from medusa_runtime.integrations.triton.inputs import TritonInputs
from medusa_runtime.integrations.triton.outputs import Answered, cancelled, failure_of, response_of
from medusa_runtime.server.api import Api
from medusa_runtime.server.completions import CompletionJob
from medusa_runtime.server.errors import api_error
from medusa_runtime.server.settings import Settings

# Seconds without a step after which a request looks whether its client has gone.
_LOOK_SECONDS = 0.2


class TritonPythonModel:
    """A bundle behind Triton. Inputs and outputs are those of Triton's vLLM backend; see ``config.pbtxt``."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Loads the bundle.

        Args:
            args: Triton's facts about the model. The parameters of its configuration are fields of ``Settings``;
                ``bundle`` is relative to the folder of the model's version.

        Raises:
            MedusaError: The bundle can't be loaded, or a parameter can't be used. Triton shows the message.
        """
        settings = _settings(args)
        self._service = settings.load_service()
        self._api = Api(self._service, settings)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="medusa-triton", daemon=True)
        self._thread.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Begins to answer requests. Responses follow from the thread of the event loop."""
        for request in requests:
            asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    def finalize(self) -> None:
        """Waits for the requests that run, within ``drain_seconds``, and closes the service."""
        self._service.drain(self._api.settings.drain_seconds)
        self._service.close()  # ends the others with an error, which their clients get
        asyncio.run_coroutine_threadsafe(_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._api.close()

    async def _answer(self, request: Any) -> None:
        """Sends the responses to a request, the last of them with Triton's mark of the end."""
        sender = request.get_response_sender()
        try:
            last = await self._responses(request, sender)
        except Exception as error:  # noqa: BLE001  # Triton gets every error
            last = failure_of(api_error(error))
        sender.send(last, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    async def _responses(self, request: Any, sender: Any) -> Any:
        """Sends the responses to a request but the last, which it returns."""
        inputs = TritonInputs.of(request)
        begin = partial(CompletionJob.begin, self._api, inputs.body, "")
        job = await self._api.in_thread(begin, lambda made: made.generation.close())
        with job.generation as generation:
            answers = [Answered(text=inputs.echoed) for _ in generation.choices]
            respond = partial(response_of, answers, inputs.returned, tokenizer=self._service.tokenizer)
            left = len(answers)
            async for deltas in generation.deltas(_LOOK_SECONDS):
                if sender.is_cancelled():
                    pb_utils.Logger.log_info("A client cancelled its request.")
                    return cancelled()
                for delta in deltas:
                    answers[delta.choice.index].add(delta)
                    left -= delta.result is not None
                if inputs.stream and deltas and left:
                    sender.send(respond(generation.usage["prompt_tokens"]))
                    for answer in answers:
                        answer.clear()
            return respond(generation.usage["prompt_tokens"])


async def _others() -> None:
    """Waits for all other tasks of the event loop."""
    await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)


def _settings(args: Mapping[str, str]) -> Settings:
    """The settings in the parameters of a model's configuration."""
    parameters = json.loads(args["model_config"])["parameters"]
    given: dict[str, object] = {name: value["string_value"] for name, value in parameters.items()}
    folder = Path(args["model_repository"]) / args["model_version"]
    given["bundle"] = folder / str(given.get("bundle", "bundle"))
    given.setdefault("model_names", args["model_name"])
    if args["model_instance_kind"] == "GPU":
        given["device"] = args["model_instance_device_id"]
    return read_fields(Settings, given)
