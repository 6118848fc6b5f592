"""What a head sees and what it should say, position by position: hidden states of the frozen base model, kept on disk.

The base model's share of an epoch is by far the larger, and always gives the same. So it runs once;
what it gives is kept in parts, which also lets the job stop and go on.
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
from medusa_export.common.progress import progress_bar
from medusa_export.training.conversations import Sample

DESCRIPTION = "features.json"
_DIGEST = "sha256"
# Tokens of a batch, padding included.
_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Features:
    """Positions to draft from.

    Attributes:
        hidden: [N, H], the base model's last hidden state.
        next_tokens: [N], the token that follows.
        targets: [N, K], the tokens after that; -1 where the conversation, or the assistant's turn, has ended.
        left: [N], how many of the rows that follow are the next positions of the same turn.
    """

    hidden: Tensor
    next_tokens: Tensor
    targets: Tensor
    left: Tensor

    def __len__(self) -> int:
        return len(self.hidden)

    @classmethod
    def join(cls, parts: Sequence[Features]) -> Features:
        """Those of several data sets, one behind the other."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


@dataclass(frozen=True)
class FeatureKey:
    """What features depend on; others are not taken for these.

    Attributes:
        model: Its name.
        weights: A fingerprint of its weights.
        data: A digest of the conversations as tokens.
        num_heads: K.
        dtype: Of the base model.
        max_length: Tokens of a conversation, at most; the rest is cut off.
    """

    model: str
    weights: str
    data: str
    num_heads: int
    dtype: str
    max_length: int

    @classmethod
    def of(cls, model: PreTrainedModel, name: str, data: str, num_heads: int, max_length: int) -> FeatureKey:
        """The key for a model in memory."""
        dtype = str(model.dtype).removeprefix("torch.")
        return cls(name, fingerprint(model), data, num_heads, dtype, max_length)


def digest_of_samples(samples: Iterable[Sample]) -> str:
    """Of conversations as tokens, and of which of these are labels."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.input_ids, sample.is_label]).encode())
    return digest.hexdigest()


def fingerprint(model: PreTrainedModel) -> str:
    """Tells models of one name apart: a digest of the first values of each weight."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, logits_at: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What the model hands to its ``lm_head``, and logits without the cost of all.

    Args:
        model: The base model.
        input_ids: [B, S].
        attention_mask: [B, S].
        logits_at: [B, S] boolean, the N places whose logits are wanted; None if none are.

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
    """Token ids and the mask of those that are there, [B, S] each."""
    ids = torch.zeros(len(samples), max(len(sample.input_ids) for sample in samples), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.input_ids)] = torch.tensor(sample.input_ids)
        mask[row, : len(sample.input_ids)] = 1
    return ids, mask


def positions_of(sample: Sample, num_heads: int) -> tuple[list[int], list[list[int]]]:
    """The positions from which a step drafts the assistant's words, and the targets of each.

    A step drafts at position i once the base model has chosen token i + 1; head k is to say token i + 1 + k.
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
    quiet: bool = False,
) -> Features:
    """Features of samples: from the folder, or computed and kept there.

    Args:
        model: The base model, on the device to run on.
        samples: Conversations as tokens.
        folder: Where they are kept.
        key: What they depend on.
        name: What to call them on the progress bar.
        otherwise: What else to do where there is no room for them, as an error says.
        quiet: No progress.

    Raises:
        DatasetError: There is nothing to learn from, no room for the features, or those there are damaged.
        OutputError: They can't be written.
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
    with progress_bar(f"hidden states, {name}", len(batches), done=done, unit="tokens", quiet=quiet) as bar:
        for number, batch in missing.items():
            tensors = _compute(model, batch, key.num_heads)
            with atomic_file(folder / _file(number)) as path:
                save_file(tensors, path, {_DIGEST: digest_of(tensors)})
            bar.add(sum(len(sample.input_ids) for sample in batch))
            bar.finish_piece()
    return _load(folder, len(batches))


def _file(number: int) -> str:
    return f"{number:06d}.safetensors"


def _begin(folder: Path, key: FeatureKey) -> None:
    """Drops features of another model or data."""
    path = folder / DESCRIPTION
    text = json.dumps(asdict(key), indent=1) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    if not path.is_file() and not is_unused(folder):
        raise DatasetError(f"{folder} holds other files: give an empty or new folder for hidden states.")
    for part in folder.glob("*.safetensors"):  # before the description: killed here, it is still true of what is left
        part.unlink()
    write_text(path, text)


def batched(samples: Sequence[Sample], max_length: int) -> Iterable[list[Sample]]:
    """Samples by length, cut to size, in batches of a number of tokens: the order in which features come."""
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
    """Bytes of the hidden states of samples, nearly."""
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
    """For each position how many follow it without a gap."""
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
                    raise OSError("its content is not what was written")
        except (SafetensorError, OSError) as error:
            raise DatasetError(f"{path} is damaged ({error}): delete it and run again to compute it anew.") from error
        for name, tensor in found.items():
            parts[name].append(tensor)
    features = Features(**{name: torch.cat(tensors) for name, tensors in parts.items()})
    if not len(features):
        raise DatasetError("The conversations hold no assistant's turn of more than one token: nothing to learn from.")
    return features


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Of the values of tensors by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def frequent_tokens(samples: Iterable[Sample], count: int) -> Tensor:
    """The tokens that the assistant writes most often, ascending: a reduced vocabulary (FR-Spec, arXiv 2502.14856).

    Args:
        samples: The training set.
        count: How many.
    """
    seen: Counter[int] = Counter()
    for sample in samples:
        seen.update(token for token, label in zip(sample.input_ids, sample.is_label, strict=True) if label)
    # Of equal ones the smaller, and where too few occur the smallest of the others.
    best = sorted(seen, key=lambda token: (-seen[token], token))[:count]
    spare = (token for token in range(count) if token not in seen)
    return torch.tensor(sorted([*best, *islice(spare, count - len(best))]))
