"""Inputs and targets of heads by position: hidden states of the frozen base model, kept on disk.

The base model takes most of the time of an epoch, and always gives the same hidden states. So it runs once, and the
hidden states are kept. They are written in parts, so a job that was interrupted can continue.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from medusa_export.common.errors import DatasetError
from medusa_export.common.files import atomic_file, is_unused, write_text
from medusa_export.common.progress import OnProgress, Task, ignore_progress
from medusa_export.training.conversations import Sample

DESCRIPTION = "features.json"
_DIGEST = "sha256"
# The most tokens of a batch, padding included.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Features:
    """Positions at which heads draft, with their inputs and targets.

    Attributes:
        hidden: The base model's last hidden state at each position, [N, H].
        next_tokens: The token after each position, [N].
        targets: The K tokens after that, [N, K]; -1 behind the end of the assistant's turn.
        left: The number of following rows that are the next positions of the same turn, [N].
    """

    hidden: Tensor
    next_tokens: Tensor
    targets: Tensor
    left: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """Joins the features of several data sets, in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class FeatureKey:
    """Everything that features depend on. Features with another key are not reused.

    Attributes:
        model: Name of the base model.
        weights: A fingerprint of the base model's weights.
        data: A digest of the conversations as tokens.
        num_heads: Number of targets per position, K.
        dtype: Type of the base model.
        max_length: The most tokens of a conversation; the rest is cut off.
    """

    model: str
    weights: str
    data: str
    num_heads: int
    dtype: str
    max_length: int

    @classmethod
    def of(cls, model: PreTrainedModel, name: str, data: str, num_heads: int, max_length: int) -> FeatureKey:
        """Makes the key for a model in memory."""
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(name, fingerprint(model), data, num_heads, dtype, max_length)


def digest_of_samples(samples: Iterable[Sample]) -> str:
    """A digest of samples: their tokens, and which of these are labels."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.input_ids, sample.is_label]).encode())
    return digest.hexdigest()


def fingerprint(model: PreTrainedModel) -> str:
    """A digest of the first values of each weight. Models of one name differ in it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, logits_at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The hidden states that a model gives to its ``lm_head``, and the logits at some positions only.

    Args:
        model: The base model.
        input_ids: Token ids, [B, S].
        attention_mask: 1 for tokens and 0 for padding, [B, S].
        logits_at: [B, S] boolean, True at the N positions whose logits are needed. None if no logits are needed.

    Returns:
        Hidden states [B, S, H], and logits [1, N, V].
    """
    captured: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        captured.append(args[0])
        rows = args[0][0, :1] if logits_at is None else args[0][logits_at]
        return (rows.unsqueeze(0), *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        output = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        hook.remove()
    return captured[0], output.logits


def padded(samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right, and the attention mask, [B, S] each."""
    ids = torch.zeros(len(samples), max(len(sample.input_ids) for sample in samples), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        mask[row, : len(sample.input_ids)] = 1
    return ids, mask


def positions_of(sample: Sample, num_heads: int) -> tuple[list[int], list[list[int]]]:
    """The positions at which a step drafts tokens of the assistant, and the targets of each.

    A step drafts at position i when the base model has chosen token i + 1. The target of head k is token i + 1 + k.
    """
    ids, is_label = sample.input_ids, sample.is_label
    positions: list[int] = []
    targets: list[list[int]] = []
    for i in range(len(ids) - 1):
        if not is_label[i + 1]:
            continue
        row: list[int] = []
        for place in range(i + 2, i + 2 + num_heads):
            inside = place < len(ids) and is_label[place] and (not row or row[-1] >= 0)
            row.append(ids[place] if inside else -1)
        if row[0] >= 0:
            positions.append(i)
            targets.append(row)
    return positions, targets


def compute_features(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    folder: Path,
    key: FeatureKey,
    *,
    name: str,
    otherwise: str,
    on_progress: OnProgress = ignore_progress,
) -> Features:
    """Reads the features of samples from a folder, or computes them and keeps them there.

    Args:
        model: The base model, on the device to run on.
        samples: Conversations as tokens.
        folder: Folder that keeps the features.
        key: Everything that the features depend on.
        name: Their name in reports.
        otherwise: The remedy if there is no room for them, as the end of an error message.
        on_progress: Receives reports on the job.

    Raises:
        DatasetError: There is nothing to learn from, no room for the features, or kept features are damaged.
        OutputError: The features can't be written.
    """
    _begin(folder, key)
    batches = list(batched(samples, key.max_length))
    missing = {number: batch for number, batch in enumerate(batches) if not (folder / _file(number)).is_file()}
    if (needed := size_of(model, missing.values())) > (free := shutil.disk_usage(folder).free):
        raise DatasetError(
            f"Hidden states take {needed / 2**30:.1f} GiB, but {folder} has {free / 2**30:.1f} GiB free: make room, or "
            f"{otherwise}."
        )
    done = len(batches) - len(missing)
    task = Task(f"hidden states, {name}", len(batches), on_progress, done=done, unit="tokens")
    for number, batch in missing.items():
        tensors = _compute(model, batch, key.num_heads)
        with atomic_file(folder / _file(number)) as path:
            save_file(tensors, path, {_DIGEST: digest_of(tensors)})
        task.add(sum(len(sample.input_ids) for sample in batch))
        task.finish_piece()
    return _load(folder, len(batches))


def _file(number: int) -> str:
    return f"{number:06d}.safetensors"


def _begin(folder: Path, key: FeatureKey) -> None:
    """Prepares the folder: deletes features of another key."""
    path = folder / DESCRIPTION
    text = json.dumps(asdict(key), indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    if not path.is_file() and not is_unused(folder):
        raise DatasetError(f"{folder} holds other files: give an empty or new folder for hidden states.")
    # Delete before the description changes: if the job is killed here, the old description still fits the other parts.
    for part in folder.glob("*.safetensors"):
        part.unlink()
    write_text(path, text)


def batched(samples: Sequence[Sample], max_length: int) -> Iterable[list[Sample]]:
    """Batches of samples, cut to ``max_length`` and sorted by length. This is the order of features."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=lambda sample: len(sample.input_ids)):
        short = sample.cut(max_length)
        if batch and (len(batch) + 1) * len(short.input_ids) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(short)
    if batch:
        yield batch


def size_of(model: PreTrainedModel, batches: Iterable[Sequence[Sample]]) -> int:
    """The approximate size of the hidden states of samples, in bytes."""
    positions = sum(sum(sample.is_label) for batch in batches for sample in batch)
    return positions * int(model.get_output_embeddings().in_features) * torch.finfo(model.dtype).bits // 8


@torch.inference_mode()
def _compute(model: PreTrainedModel, batch: Sequence[Sample], num_heads: int) -> dict[str, Tensor]:
    ids, mask = padded(batch)
    hidden = hidden_states(model, ids.to(model.device), mask.to(model.device))[0].cpu()
    kept, next_tokens, targets, left = [], [], [], []
    for row, sample in enumerate(batch):
        positions, found = positions_of(sample, num_heads)
        kept.append(hidden[row, positions])
        next_tokens += [sample.input_ids[i + 1] for i in positions]
        targets += found
        left += _left(positions)
    return {
        "hidden": torch.cat(kept).contiguous(),
        "next_tokens": torch.tensor(next_tokens, dtype=torch.int32),
        "targets": torch.tensor(targets, dtype=torch.int32).reshape(-1, num_heads),
        "left": torch.tensor(left, dtype=torch.int32),
    }


def _left(positions: Sequence[int]) -> list[int]:
    """Counts the positions that follow each position without a gap."""
    counts = [0] * len(positions)
    for place in range(len(positions) - 2, -1, -1):
        if positions[place + 1] == positions[place] + 1:
            counts[place] = counts[place + 1] + 1
    return counts


def _load(folder: Path, count: int) -> Features:
    parts: dict[str, list[Tensor]] = {"hidden": [], "next_tokens": [], "targets": [], "left": []}
    for number in range(count):
        path = folder / _file(number)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in parts}
                if digest_of(found) != (file.metadata() or {}).get(_DIGEST):
                    raise OSError("its content does not match its digest")
        except (SafetensorError, OSError) as error:
            raise DatasetError(f"{path} is damaged ({error}): delete it and run again to compute it again.") from error
        for name, tensor in found.items():
            parts[name].append(tensor)
    features = Features(**{name: torch.cat(tensors) for name, tensors in parts.items()})
    if not len(features):
        raise DatasetError("The conversations hold no assistant's turn of more than one token: nothing to learn from.")
    return features


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """A digest of the values of tensors, given by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frequent_tokens(samples: Iterable[Sample], count: int) -> Tensor:
    """The tokens that the assistant writes most often, in ascending order.

    They are a reduced vocabulary for heads (FR-Spec, arXiv 2502.14856).

    Args:
        samples: The training set.
        count: Number of tokens.
    """
    seen: Counter[int] = Counter()
    for sample in samples:
        seen.update(token for token, label in zip(sample.input_ids, sample.is_label, strict=True) if label)
    # Of equally frequent tokens the smaller id comes first. If too few tokens occur, the smallest other ids are added.
    best = sorted(seen, key=lambda token: (-seen[token], token))[:count]
    spare = (token for token in range(count) if token not in seen)
    return torch.tensor(sorted([*best, *islice(spare, count - len(best))]))
