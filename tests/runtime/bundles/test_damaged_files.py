"""Files that are damaged, missing, too large, outside the folder or not listed: each is refused by name or ignored."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.file_download import _create_symlink

from medusa_export.common.errors import SettingsError
from medusa_export.heads.writer import check_config
from medusa_export.training.settings import read_settings
from medusa_runtime import BackendError, Bundle, BundleError, MedusaEngine, MedusaError
from medusa_runtime.bundles.bundle import DESCRIPTION, ONNXRUNTIME_GRAPH
from medusa_runtime.bundles.description import MAX_DESCRIPTION_BYTES
from medusa_runtime.bundles.json_file import MAX_VALUES, parse_json
from medusa_runtime.bundles.listed_folder import ListedFolder, read_file, write_cache_file
from medusa_runtime.decoding.latency import CACHE_FILE, LatencyTable
from medusa_runtime.text.tokenizer import Tokenizer
from medusa_runtime.text.tokenizer_files import MAX_TEMPLATE_BYTES

PROMPT = [5, 6, 7]


@pytest.fixture
def folder(tiny_bundle: Bundle, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bundle.folder, tmp_path / "bundle"))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))


# Descriptions


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"contract_version": 3, "x": ' + "[" * 10_000 + "]" * 10_000 + "}", "nested too deeply"),
        ('{"contract_version": ' + "9" * 5_000 + "}", "'contract_version': integer value out of range"),
        ('{"contract_version": 1e400}', "contract_version"),
        ('{"contract_version": NaN}', "not valid JSON"),
        ('{"contract_version": -1}', "'contract_version': expected `int` >= 1"),
        ('{"contract_version": "\\ud800"}', "medusa.json"),
        ('{"contract_version": true}', "expected `int`, got `bool`"),
        ("{}", "'contract_version' is missing"),
        ("[]", "the outermost value: expected `object`, got `array`"),
        ("", "not valid JSON"),
        ("\x00", "not valid JSON"),
        ("{" + '"a":0,' * MAX_VALUES + '"b":0}', "more than the 500,000 values"),
    ],
)
def test_text_that_is_no_description(folder: Path, text: str, words: str) -> None:
    (folder / DESCRIPTION).write_text(text)
    with pytest.raises(BundleError, match=words):
        Bundle.load(folder)


def _set(*keys: str | int, to: object) -> Callable[[dict[str, Any]], object]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = to

    return edit


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (_set("model", "num_layers", to=10**9), r"'model\.num_layers': expected `int` <= 1024"),
        (_set("model", "num_layers", to=-1), r"'model\.num_layers': expected `int` >= 1"),
        (_set("model", "vocab_size", to=10**30), r"model\.vocab_size"),
        (_set("model", "name", to="x" * 5000), r"'model\.name': expected `str` of length <= 1024"),
        (_set("model", "name", to=3), r"'model\.name': expected `str`, got `int`"),
        (_set("dtype", to="int4"), "dtype"),
        (_set("tree", "paths", to=[[0]] * 5000), r"'tree\.paths': expected `array` of length <= 4096"),
        (_set("tree", "paths", to=[[0] * 65]), r"'tree\.paths\[0\]': expected `array` of length <= 64"),
        (_set("tree", "paths", 0, to=[10**20]), r"tree\.paths"),
        (_set("tree", "paths", 0, to=[0.5]), r"'tree\.paths\[0\]\[0\]': expected `int`, got `float`"),
        (_set("acceptance", "node_values", 0, to=1e308), "expected `float` <= 1"),
        (_set("heads", "num_heads", to=10**9), r"'heads\.num_heads': expected `int` <= 64"),
        (_set("files", "x" * 300, to={"size": 1, "sha256": ""}), "can't be read: File name too long"),
        (_set("files", "nul\0", to={"size": 1, "sha256": ""}), "nul"),
        (_set("files", "model.onnx", to={"size": -1, "sha256": ""}), "expected `int` >= 0"),
        (_set("files", ".", to={"size": 1, "sha256": ""}), "not a regular file"),
        (_set("inputs", 0, "shape", to=[[]]), "inputs"),
    ],
)
def test_values_out_of_bounds(folder: Path, edit: Callable[[dict[str, Any]], object], words: str) -> None:
    change(folder / DESCRIPTION, edit)
    for check_digests in (True, False):
        with pytest.raises(BundleError, match=words):
            Bundle.load(folder, check_digests=check_digests)


def test_keys_of_newer_versions_are_skipped(folder: Path, tiny_bundle: Bundle) -> None:
    change(folder / DESCRIPTION, lambda data: data["model"].update(fashion=[{}]) or data.update(later={"a": [1]}))
    assert Bundle.load(folder).model == tiny_bundle.model


def test_a_huge_description_is_refused_unread(folder: Path) -> None:
    os.truncate(folder / DESCRIPTION, 2**40)  # a sparse file, larger than memory
    with pytest.raises(BundleError, match=f"at most {MAX_DESCRIPTION_BYTES:,} are read"):
        Bundle.load(folder)


@pytest.mark.parametrize("name", [DESCRIPTION, "tokenizer.json", "model.onnx", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "gone", "circle"])
def test_other_kinds_of_files_are_refused(folder: Path, name: str, kind: str) -> None:
    path = folder / name
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "circle":
        path.symlink_to(path)
    for check_digests in (True, False):
        with pytest.raises(BundleError, match=name):
            Bundle.load(folder, check_digests=check_digests)


@pytest.mark.parametrize("place", ["x" * 300, "nul\0", "none", "a/" * 3000])
def test_paths_without_a_bundle(tmp_path: Path, place: str) -> None:
    with pytest.raises(BundleError, match="There is no bundle at") as caught:
        Bundle.load(tmp_path / place)
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


def test_a_file_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    fstat = os.fstat

    def late(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        with path.open("ab") as file:
            file.write(b"5")
        return found

    monkeypatch.setattr(os, "fstat", late)
    with pytest.raises(BundleError, match="changed while it was read"):
        read_file(path, at_most=100)


def test_the_caller_chooses_the_type_of_the_error(tmp_path: Path) -> None:
    class OtherError(MedusaError):
        pass

    with pytest.raises(OtherError, match=r"expected `int`, got `str`\. Do this"):
        parse_json(b'"x"', int, "there", remedy="Do this.", error=OtherError)
    with pytest.raises(OtherError, match="No such file"):
        read_file(tmp_path / "none", at_most=1, error=OtherError)


# Files that are not listed


def relist(folder: Path, *without: str) -> None:
    change(folder / DESCRIPTION, lambda data: [data["files"].pop(name) for name in without])


@pytest.mark.parametrize("check_digests", [True, False])
def test_files_beside_the_list_are_not_read(folder: Path, tmp_path: Path, check_digests: bool) -> None:
    relist(folder, "chat_template.jinja", "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text("planted")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("planted")
    (folder / "special_tokens_map.json").write_text('{"eos_token": "planted"}')
    (folder / "tokenizer_config.json").write_text("[damaged")
    tokenizer = Tokenizer.load(Bundle.load(folder, check_digests=check_digests).listed)
    assert (tokenizer.chat_templates, tokenizer.named_tokens) == ({}, {})
    relist(folder, "tokenizer.json")
    (tmp_path / "elsewhere").write_bytes((folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    with MedusaEngine.load(folder, check_digests=check_digests) as engine:
        assert engine.tokenizer is None


def test_listed_templates_of_a_subfolder_are_read(folder: Path) -> None:
    path = folder / "additional_chat_templates" / "rag.jinja"
    path.parent.mkdir()
    path.write_text("R")
    name = "additional_chat_templates/rag.jinja"
    facts = {"size": 1, "sha256": hashlib.sha256(b"R").hexdigest()}
    change(folder / DESCRIPTION, lambda data: data["files"].update({name: facts}))
    listed = Bundle.load(folder).listed
    assert Tokenizer.load(listed).chat_templates["rag"] == "R"
    path.write_text("r")  # after the check: the content must be checked when it is read
    with pytest.raises(BundleError, match="does not match the digest"):
        Tokenizer.load(listed)


def hub_snapshot(folder: Path, cache: Path) -> Path:
    """The snapshot of a repository with these files in a hub's cache, as ``snapshot_download`` finds it."""
    repository = cache / "models--someone--bundle"
    revision = "0123456789012345678901234567890123456789"
    for path in folder.rglob("*"):
        if path.is_file():
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, blob)
            pointer = repository / "snapshots" / revision / path.relative_to(folder)
            pointer.parent.mkdir(parents=True, exist_ok=True)
            _create_symlink(str(blob), str(pointer), new_blob=False)
            assert pointer.is_symlink()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    return Path(snapshot_download("someone/bundle", cache_dir=cache, local_files_only=True))


@pytest.mark.parametrize("check_digests", [True, False])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_bundle_in_a_hubs_cache(tiny_bundle: Bundle, tmp_path: Path, check_digests: bool, rows: int) -> None:
    from medusa_runtime.backends import open_backend

    snapshot = hub_snapshot(tiny_bundle.folder, tmp_path / "cache")
    bundle = Bundle.load(snapshot, check_digests=check_digests)
    with MedusaEngine(bundle, open_backend("onnxruntime", bundle, rows=rows), Tokenizer.load(bundle.listed)) as engine:
        found = engine.generate("Hi", max_new_tokens=8, tree_size=4)
    with MedusaEngine.load(tiny_bundle.folder, check_digests=False) as engine:
        assert engine.generate("Hi", max_new_tokens=8, tree_size=4).token_ids == found.token_ids


def test_a_hubs_snapshot_leads_to_its_own_blobs_only(tiny_bundle: Bundle, tmp_path: Path) -> None:
    snapshot = hub_snapshot(tiny_bundle.folder, tmp_path / "cache")
    (tmp_path / "secret").write_bytes((tiny_bundle.folder / "tokenizer.json").read_bytes())
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to(tmp_path / "secret")
    Bundle.load(snapshot)  # allowed, because its digest is checked
    with pytest.raises(BundleError, match=r"tokenizer\.json .* leads outside"):
        Bundle.load(snapshot, check_digests=False)
    with pytest.raises(BundleError, match=r"tokenizer\.json .* leads outside"):
        Tokenizer.load(snapshot)
    (tmp_path / "secret").write_bytes((tmp_path / "secret").read_bytes()[:-1] + b" ")
    with pytest.raises(BundleError, match="does not match the digest"):
        Bundle.load(snapshot)


def test_names_that_lead_outside(tmp_path: Path) -> None:
    for name in ("../x", "/etc/passwd", "a\\..\\b", "a/../../x"):
        with pytest.raises(BundleError, match="is outside the folder"):
            ListedFolder(tmp_path, {name: None}, description="d").read(name, at_most=1)


# Files that the runtime writes


class Idle:
    """A backend that must not run."""

    name = "idle"
    rows = 1
    step = None


def test_a_latency_table_of_another_tree_is_measured_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(folder)
    monkeypatch.setattr("medusa_runtime.decoding.latency._measure", lambda *_, **__: {"1": 1.0, "9": 2.0})
    assert LatencyTable.measured(bundle, Idle()).seconds == {1: 1.0, 9: 2.0}
    monkeypatch.setattr("medusa_runtime.decoding.latency._measure", lambda *_, **__: {"1": 3.0})
    assert LatencyTable.measured(bundle, Idle()).seconds == {1: 1.0, 9: 2.0}
    for table in ({"1": 1.0, "10": 1.0}, {"1": 1.0, "0": 1.0}, {"1": 1e300}, {"1": -1.0}, {"01": 1.0}, {"\u0661": 1.0}):
        path = folder / CACHE_FILE
        path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), table)))
        assert LatencyTable.measured(bundle, Idle()).seconds == {1: 3.0}
    for data in (b"[" * 100_000, b"\xff", b"{" + b'"a":{},' * MAX_VALUES + b'"b":{}}'):
        path.write_bytes(data)
        assert LatencyTable.measured(bundle, Idle()).seconds == {1: 3.0}
    path.write_text(json.dumps({key: {"9": 2.0, "1": 1.0} for key in json.loads(path.read_text())}))
    assert list(LatencyTable.measured(bundle, Idle()).seconds) == [1, 9]


def test_a_link_to_elsewhere_is_not_followed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = tmp_path / "outside"
    outside.write_text("{}")
    (folder / CACHE_FILE).unlink(missing_ok=True)
    (folder / CACHE_FILE).symlink_to(outside)
    monkeypatch.setattr("medusa_runtime.decoding.latency._measure", lambda *_, **__: {"1": 1.0})
    LatencyTable.measured(Bundle.load(folder), Idle())
    assert outside.read_text() == "{}"
    assert not (folder / CACHE_FILE).is_symlink()
    assert len(json.loads((folder / CACHE_FILE).read_text())) == 1
    (folder / "pipe").mkdir()
    os.mkfifo(folder / "pipe" / CACHE_FILE)
    write_cache_file(folder / "pipe" / CACHE_FILE, b"data")
    assert (folder / "pipe" / CACHE_FILE).read_bytes() == b"data"
    assert [path.name for path in (folder / "pipe").iterdir()] == [CACHE_FILE]


# Files that the exporter reads


def test_deep_nesting_elsewhere(tmp_path: Path) -> None:
    for name in ("config.json", "settings.json"):
        (tmp_path / name).write_text("[" * 100_000)
    check_config(tmp_path)  # not a model's configuration: heads may be written there
    with pytest.raises(SettingsError, match="can't be read"):
        read_settings(tmp_path / "settings.json")


# Tokenizers


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("chat_template.jinja", "{% for %}", "syntax error on line 1"),
        ("chat_template.jinja", "{{ x|nofilter }}", "nofilter"),
        ("chat_template.jinja", "{{ " + "(" * 5000 + ")" * 5000 + " }}", "too deeply|can't be compiled"),
        ("chat_template.jinja", "x" * (MAX_TEMPLATE_BYTES + 1), "at most 262,144"),
        ("chat_template.jinja", "{{a}}" * 20_000, "more than 30,000 tokens"),
        ("tokenizer_config.json", json.dumps({"chat_template": "{% if %}"}), "syntax error"),
        ("tokenizer_config.json", json.dumps({"chat_template": "x" * (MAX_TEMPLATE_BYTES + 1)}), "at most"),
        ("tokenizer_config.json", json.dumps({"chat_template": {str(i): "" for i in range(65)}}), "more than the 64"),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"9" * 5000: {"content": "x"}}}), "config"),
        ("tokenizer_config.json", json.dumps({"eos_token": {"content": "x", "lstrip": "yes"}}), "eos_token|lstrip"),
        ("tokenizer_config.json", '{"x": ' + "[" * 100_000, "nested too deeply"),
        ("tokenizer.json", "[" * 100_000, "tokenizer"),
    ],
)
def test_damaged_tokenizers(folder: Path, name: str, content: str, words: str) -> None:
    if name != "chat_template.jinja":
        (folder / "chat_template.jinja").unlink()
    (folder / name).write_text(content)
    with pytest.raises(BundleError, match=words):
        Tokenizer.load(folder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: state.update(
            model={
                "type": "WordPiece",
                "unk_token": "[none]",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100,
                "vocab": state["model"]["vocab"],
            }
        ),
        lambda state: state.update(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {},
            }
        ),
    ],
    ids=["an error", "a panic"],
)
def test_errors_of_the_library_in_encode_are_reported(folder: Path, damage: Callable[[Any], None]) -> None:
    change(folder / "tokenizer.json", damage)
    tokenizer = Tokenizer.load(folder)
    with pytest.raises(BundleError, match="tokenizers library can't encode this text"):
        tokenizer.encode("中 Hello")


def test_a_damaged_graph_prints_nothing(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By default ONNX Runtime prints an error to the program's output, and tries again."""
    graph = folder / ONNXRUNTIME_GRAPH
    data = graph.read_bytes()
    assert b"GroupQueryAttention" in data
    graph.write_bytes(data.replace(b"GroupQueryAttention", b"GroupQueryAttentio\xdf"))
    with pytest.raises(BackendError, match=r"can't load .*utf-8"):
        MedusaEngine.load(folder, check_digests=False)
    assert capfd.readouterr().out == ""


def test_the_precedence_of_several_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "default.jinja").write_text("low")
    (folder / "chat_template.jinja").write_text("high")
    assert Tokenizer.load(folder).chat_templates == {"default": "high"}
