# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recipes: what is read, what is refused and in which words."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from yolo_prune.errors import RecipeError
from yolo_prune.recipe import CriterionSpec, Recipe, bundled_names, json_schema, load_recipe

T = "target: {flops: 0.5}"
FIELDS = "flops, params, max_drop, latency, format, device, imgsz, batch, threads, quantize, profile"
ONE = "target: give exactly one of flops, params, latency and max_drop"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_bundled_recipes_and_the_default() -> None:
    keeps = {name: (load_recipe(name).metric, load_recipe(name).keep) for name in bundled_names()}
    assert {name: keep for name, (metric, keep) in keeps.items() if metric == "flops"} == {
        "half-flops": 0.5,
        "gentle": 0.75,
        "edge": 0.3,
        "smallest": None,
    }
    assert keeps["lottery"] == ("weights", pytest.approx(0.2))
    assert load_recipe() == load_recipe("half-flops")


def test_importing_recipes_stays_light() -> None:
    code = "import sys, yolo_prune.recipe; print([m for m in ('torch', 'ultralytics') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("given", "name", "options"),
    [
        ("random", "random", {}),
        ({"name": "magnitude", "norm": 1}, "magnitude", {"norm": 1}),
        ({"name": "mine", "data": {"a": [1]}}, "mine", {"data": {"a": [1]}}),
    ],
)
def test_a_criterion_is_a_name_or_a_flat_mapping(given: object, name: str, options: dict[str, object]) -> None:
    spec = load_recipe({"target": {"flops": 0.5}, "criterion": given}).criterion
    assert isinstance(spec, CriterionSpec)
    assert (spec.name, spec.options) == (name, options)


def test_a_recipe_needs_no_more_than_a_target() -> None:
    recipe = load_recipe({"target": {"params": 0.4}})
    assert (recipe.target.metric, recipe.target.keep) == ("params", 0.4)
    assert (recipe.channels.min, recipe.recover.batchnorm, recipe.proof) == (8, 32, True)


def test_weights_that_are_rewound_are_not_refitted() -> None:
    rewound = load_recipe("half-flops", {"recover.rewind.epoch": 3, "schedule.start": 3})
    assert (rewound.recover.refit, rewound.recover.batchnorm) == (0, 32)
    assert load_recipe(rewound.to_dict()) == rewound
    assert load_recipe("half-flops").recover.refit == 64


@pytest.mark.parametrize("name", ["half-flops", "gentle", "edge"])
def test_yaml_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, {"protect": ["model.0", "model.1*"], "criterion.norm": 1})
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert load_recipe(recipe.to_dict()) == recipe
    assert load_recipe(recipe) == recipe


@pytest.mark.parametrize(
    ("overrides", "field", "value"),
    [
        ({"target.flops": 0.4}, "target", {"flops": 0.4}),
        ({"target.flops": "0.4"}, "target", {"flops": 0.4}),
        ({"target.params": 0.6}, "target", {"params": 0.6}),
        ({"criterion": "random"}, "criterion", {"name": "random"}),
        (
            {"criterion.name": "bn_scale", "criterion.sparsity": "1e-4"},
            "criterion",
            {"name": "bn_scale", "sparsity": 0.0001},
        ),
        ({"criterion.name": "random", "criterion.seed": "3"}, "criterion", {"name": "random", "seed": 3}),
        ({"protect": "model.0"}, "protect", ["model.0"]),
        ({"protect": "[model.0, model.2*]"}, "protect", ["model.0", "model.2*"]),
        ({"schedule.rounds": "2", "schedule.curve": "linear"}, "schedule", {"rounds": 2, "curve": "linear"}),
        ({"proof": "false"}, "proof", False),
        ({"protect": "*.cv2"}, "protect", ["*.cv2"]),
        ({"target": "{params: 0.6}"}, "target", {"params": 0.6}),
        ({"target.latency": "0.6", "target.device": "0"}, "target", {"latency": 0.6, "device": "0"}),
        (
            {"channels.layers": "{model.0: {max_removed: 0.25}, '*.cv1': {round_to: 16, min: 16}}"},
            "channels",
            {
                "min": 8,
                "max_removed": 0.75,
                "attention": "dims",
                "layers": {"model.0": {"max_removed": 0.25}, "*.cv1": {"round_to": 16, "min": 16}},
            },
        ),
        ({"schedule.start": None}, "schedule", {"curve": "cubic"}),
    ],
)
def test_overrides(overrides: dict[str, object], field: str, value: object) -> None:
    assert load_recipe("half-flops", overrides).to_dict()[field] == value


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("target: {flopz: 0.5}", "target.flopz: unknown key; did you mean 'flops'?"),
        (f"{T}\nchanels: {{min: 8}}", "chanels: unknown key; did you mean 'channels'?"),
        (
            f"{T}\nxyzzy: 1",
            "xyzzy: unknown key; known keys are version, target, sparsity, structure, schedule, criterion, ",
        ),
        (f"{T}\nrecover: {{xyzzy: 1}}", "recover.xyzzy: unknown key; known keys are refit, batchnorm"),
        (f"{T}\nrounds: 5", "rounds: unknown key; did you mean 'schedule.rounds'?"),
        (f"{T}\nchannels: {{rounds: 5}}", "channels.rounds: unknown key; did you mean 'schedule.rounds'?"),
        (f"{T}\nschedule.rounds: 5", "schedule.rounds: unknown key; write it as 'schedule: {rounds: 5}'"),
        (f"{T}\n1: 2", "1: unknown key; known keys are version"),
        ("target: {flops: half}", "target.flops: must be a number above 0 and below 1, got 'half' (fraction of the"),
        ("target: {flops: 1.5}", "target.flops: must be a number above 0 and below 1, got 1.5 (fraction of the"),
        ("target: {flops: 0}", "target.flops: must be a number above 0 and below 1, got 0 "),
        ("target: {params: .nan}", "target.params: must be a number above 0 and below 1, got nan "),
        ("target: {flops: true}", "target.flops: must be a number above 0 and below 1, got True "),
        (
            "target: 0.5",
            f"target: must be a mapping with {FIELDS}, got 0.5 ",
        ),
        (
            "target: {flops: 0.5, params: 0.4}",
            "target: give exactly one of flops, params, latency and max_drop, for example {flops: 0.5}, "
            "got {'flops': 0.5, 'params': 0.4}",
        ),
        (
            "target: {flops: 0.5, format: onnx}",
            "target: format needs latency beside it: add latency, or leave format out",
        ),
        (
            "target: {latency: 0.5, format: onnx, profile: pi.json}",
            "target: format is already fixed by the profile; leave format out",
        ),
        (
            "target: {latency: 0.5, imgsz: 100}",
            "target.imgsz: must be a whole number at least 32 and a multiple of 32, got 100",
        ),
        (
            "target: {latency: 0.5, imgsz: [480, 640]}",
            "target.imgsz: latency targets need a square size here, so give one number; for rectangles, measure",
        ),
        ("target: {latency: 0.5, format: tflite}", "target.format: must be one of torch, torchscript, onnx, openvino"),
        ("target: {latency: 0.5, quantize: 8}", "target.quantize: must be one of 16, 32, got 8"),
        (
            "target: {}",
            "target: give exactly one of flops, params, latency and max_drop, for example {flops: 0.5}, got {}",
        ),
        ("schedule: {rounds: 3}", "target: is missing; add it, for example 'target: {flops: 0.5}'"),
        (
            f"{T}\nschedule: {{rounds: 0}}",
            "schedule.rounds: must be a whole number at least 1 and at most 100, got 0 (number of cuts",
        ),
        (f"{T}\nschedule: {{rounds: 101}}", "schedule.rounds: must be a whole number at least 1 and at most 100"),
        (f"{T}\nschedule: {{rounds: true}}", "schedule.rounds: must be a whole number at least 1 and at most 100, g"),
        (f"{T}\nschedule: {{start: -1}}", "schedule.start: must be a whole number at least 0, got -1 "),
        (f"{T}\nschedule: {{interval: 2.5}}", "schedule.interval: must be a whole number at least 1, got 2.5 "),
        (f"{T}\nschedule: 3", "schedule: must be a mapping with rounds, start, interval, curve, got 3 "),
        (
            f"{T}\nschedule: {{rounds: 2, curve: one-shot}}",
            "schedule: curve one-shot is a single cut; set rounds to 1, or curve to cubic or linear, got {'curve': 'on",
        ),
        (
            f"{T}\nschedule: {{curve: cubik}}",
            "schedule.curve: must be one of one-shot, linear, cubic, got 'cubik'; did you mean 'cubic'? (how the",
        ),
        ("version: 2\ntarget: {flops: 0.5}", "version: must be 1, got 2 (version of the recipe format)"),
        (f"{T}\ncriterion: 5", "criterion: must be a text or a mapping with name, got 5 "),
        (f"{T}\ncriterion: {{name: 3}}", "criterion.name: must be a text, got 3 (obs, taylor"),
        (f"{T}\nchannels: {{max_removed: 1}}", "channels.max_removed: must be a number above 0 and below 1, got 1 "),
        (
            f"{T}\nchannels: {{layers: {{model.0: {{mn: 8}}}}}}",
            "channels.layers.model.0.mn: unknown key; did you mean 'min'?",
        ),
        (
            f"{T}\nsparsity: {{amount: 0.5, layers: {{model.0: {{xyzzy: 8}}}}}}",
            "sparsity.layers.model.0.xyzzy: unknown key; known keys are amount",
        ),
        (
            f"{T}\nchannels: {{layers: {{model.0: {{xyzzy: 8}}}}}}",
            "channels.layers.model.0.xyzzy: unknown key; known keys are round_to, min, max_removed",
        ),
        (
            f"{T}\nchannels: {{layers: {{model.0: {{attention: heads}}}}}}",
            "channels.layers.model.0.attention: unknown key; did you mean 'channels.attention'?",
        ),
        (
            f"{T}\nchannels: {{layers: {{'*.cv1': {{max_removed: 2}}}}}}",
            "channels.layers.*.cv1.max_removed: must be a number above 0 and below 1, got 2 (maximum removed",
        ),
        (
            f"{T}\nchannels: {{layers: {{0: 5}}}}",
            "channels.layers.0: must be a mapping with round_to, min, max_removed, got 5",
        ),
        (f"{T}\nchannels: {{layers: [model.0]}}", "channels.layers: must be a mapping, got ['model.0'] (limits"),
        (f"{T}\nrecover: {{batchnorm: -1}}", "recover.batchnorm: must be a whole number at least 0, got -1 "),
        (
            f"{T}\nrecover: {{rewind: 3}}",
            "recover.rewind: must be a mapping with epoch, got 3 (after each cut, t",
        ),
        (
            f"{T}\nrecover: {{rewind: {{}}}}",
            "recover.rewind.epoch: is missing; add it, for example 'rewind: ",
        ),
        (f"{T}\nrecover: {{rewind: {{epoc: 3}}}}", "recover.rewind.epoc: unknown key; did you mean 'epoch'?"),
        (f"{T}\nrecover: {{rewind: {{epoch: -1}}}}", "recover.rewind.epoch: must be a whole number at least 0, got -1"),
        (
            f"{T}\nrecover: {{rewind: {{epoch: 3}}}}\nschedule: {{start: 2}}",
            "recover: the first cut, at epoch 2 (schedule.start), cannot rewind to epoch 3, because",
        ),
        (
            f"{T}\nrecover: {{learning_rate: rewnd}}",
            "recover.learning_rate: must be one of run, rewind, got 'rewnd'",
        ),
        (f"{T}\nproof: maybe", "proof: must be true or false, got 'maybe' (prove each cut"),
        (f"{T}\nprotect: [1]", "protect.0: must be a text or a list of texts, got 1 (modules that are never"),
        (f"{T}\nprotect: {{a: b}}", "protect: must be a text or a list of texts, got {'a': 'b'} "),
        (
            f"target: [0x{'f' * 9999}]",
            f"target: must be a mapping with {FIELDS}, got [a huge number] ",
        ),
        (
            f"{T}\nschedule: {{curve: 0x{'f' * 9999}}}",
            "schedule.curve: must be one of one-shot, linear, cubic, got a h",
        ),
        (f"{T}\nchannels: {{schedule: 1}}", "channels.schedule: unknown key; did you mean 'schedule'?"),
        (
            f"target: {{flops: 0x{'f' * 9999}}}",
            "target.flops: must be a number above 0 and below 1, got a huge number ",
        ),
    ],
)
def test_bad_values_are_refused_with_the_place_and_the_remedy(text: str, line: str, tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    head, *lines = str(error.value).splitlines()
    assert head == f"The recipe ({path}) is not valid:"
    assert any(found.startswith(f"  {line}") for found in lines), lines


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        (f"{T}\n{T}", ["line 2, column 1: the key 'target' is given twice"]),
        (f"{T}\nchannels: {{min: 8, min: 9}}", ["line 2, column 20: the key 'min' is given twice"]),
        ("target: {flops: 0.5", ["is not valid YAML: line 1, column 20: while parsing a flow mapping, expected"]),
        (f"{T}\n\tproof: true", ["is not valid YAML: line 2, column 1", "cannot start any token"]),
        (f"{T}\n---\n{T}", ["line 2, column 1: expected a single document"]),
        (f"{T}\nprotect: [*.cv2]", ["line 2, column 12: ", "put quotes around a text that begins with *"]),
        (f"x: &x 1\n{T}\nproof: *x", ["line 3, column 8: aliases are not allowed"]),
        (f"{T}\nproof: 2001-13-01", ["is not valid YAML: month must be in 1..12"]),
        ("[" * 2000, ["is nested too deeply"]),
        ("- flops\n- 0.5", ["must be a mapping such as 'target: {flops: 0.5}', found a list"]),
        ("half-flops", ["must be a mapping", "found a str"]),
        ("", ["must be a mapping", "found an empty file"]),
        ("# nothing\n", ["must be a mapping", "found an empty file"]),
        ("#" * 70_000, ["larger than 64 KiB"]),
        ("target: !!python/object/apply:os.system ['true']", ["is not valid YAML: line 1", "python/object"]),
    ],
)
def test_files_that_are_not_recipes_are_refused(text: str, fragments: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    for fragment in (*fragments, str(path)):
        assert fragment in str(error.value)
    assert len(str(error.value)) < len(str(path)) + 200


def test_messages_quote_no_more_of_a_value_than_is_useful(tmp_path: Path) -> None:
    path = write(tmp_path, f"target: {{flops: '{'9' * 5000}'}}\nproof: [{'[a], ' * 500}]")
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    assert len(str(error.value)) < len(str(path)) + 500


def test_a_file_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(T, encoding="utf-16")
    with pytest.raises(RecipeError, match=r"mine\.yaml' is not UTF-8 text"):
        load_recipe(path)
    path.write_text(T, encoding="utf-8-sig")
    assert load_recipe(path).target.keep == 0.5


def test_every_problem_is_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(tmp_path, "target: {flops: 2}\nchannels: {min: 0, round: 4}\nproof: 1.5"))
    assert [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]] == [
        "target.flops",
        "channels.min",
        "channels.round",
        "proof",
    ]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "halfflops",
            "There is no recipe 'halfflops'. Did you mean 'half-flops'\\? Pass one of .*edge, gentle, half-flops",
        ),
        ("zzz", "There is no recipe 'zzz'. Pass one of the bundled recipes"),
        ("nowhere/mine.yaml", "The recipe 'nowhere/mine.yaml' cannot be read: No such file"),
        ("nowhere/mine.YML", "The recipe 'nowhere/mine.YML' cannot be read: No such file"),
        ("edge.yaml", "cannot be read: No such file or directory. The bundled recipe is called 'edge'"),
        ("a\0.yaml", "cannot be read: embedded null byte"),
    ],
)
@pytest.mark.usefixtures("clean_cwd")
def test_recipes_that_are_not_there(source: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(source)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"target.flop": 0.4}, "target.flop: unknown key; did you mean 'flops'"),
        ({"shedule.rounds": 2}, "shedule: unknown key; did you mean 'schedule'"),
        ({"rounds": 2}, "rounds: unknown key; did you mean 'schedule.rounds'"),
        ({"schedule.rounds.x": 2}, r"schedule.rounds: must be a whole number .* got {'x': 2}"),
        (
            {"channels.layers.model.0.min": 2},
            r"recipe.channels.layers.model.0.min': a single layer cannot be overridden",
        ),
        (
            {"target.flops": 0.4, "target.params": 0.3},
            "target: give exactly one of flops, params, latency and max_drop",
        ),
        (
            {"schedule.curve": "one-shot", "schedule.rounds": 3},
            "schedule: curve one-shot is a single cut; set rounds to 1",
        ),
        ({"guard.on_breach": "stop"}, "is not valid:\n  guard.on_breach: stop needs a limit"),
        (
            {"target.max_drop": 0.01, "schedule.curve": "one-shot"},
            "schedule.curve: one-shot is a single cut, but target.max_drop needs several",
        ),
        ({"channels.layers": {"model.1": 0.5}}, r"mapping with round_to, min, max_removed, got 0.5$"),
        ({"protect": "[model.0"}, r"recipe.protect='\[model.0': the value is not valid YAML: line 1, column 9"),
        ({"protect": "[" * 2000}, "the value is not valid YAML: it is nested too deeply"),
        ({"proof": "2001-13-01"}, "the value is not valid YAML: month must be"),
        ({"schedule": "{rounds: 1, rounds: 2}"}, "the key 'rounds' is given twice"),
        ({"schedule..rounds": 2}, "'recipe.schedule..rounds' is not the name of a field"),
        ({"": 2}, "'recipe.' is not the name of a field. Write a field as in recipe.target.flops=0.4"),
        ({"proof": 3}, r"\(half-flops, with overrides\) is not valid:\n  proof: must be true or false, got 3"),
    ],
)
def test_bad_overrides(overrides: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("half-flops", overrides)


def test_a_mapping_that_was_passed_is_not_changed() -> None:
    mine = {"target": {"flops": 0.5}}
    load_recipe(mine, {"target.flops": 0.3})
    assert mine == {"target": {"flops": 0.5}}


def test_the_schema_knows_every_field_and_forbids_others() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["anyOf"] == [{"required": [field]} for field in ("target", "sparsity", "structure")]
    assert schema["properties"]["criterion"]["anyOf"][0]["type"] == "string"
    for part, fields in {"": schema, **schema["$defs"]}.items():
        assert fields.get("additionalProperties") is part.endswith("Spec")  # options of a criterion are its own
        for field in fields["properties"].values():
            assert field["description"]
            assert "title" in field or schema["$defs"][field["$ref"].rpartition("/")[2]]["title"]
    json.dumps(schema)


def test_bundled_recipes_say_what_each_field_does() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    for path in folder.glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        assert set(yaml.safe_load(text)) == set(Recipe.model_fields)
        assert [line for line in text.splitlines() if "#" not in line] == []


def test_a_target_keeps_what_an_override_does_not_exclude() -> None:
    ncnn = {"target": {"latency": 0.6, "format": "ncnn", "imgsz": 320}}

    def target(**fields: object) -> dict[str, object]:
        found: dict[str, object] = load_recipe(ncnn, {f"target.{k}": v for k, v in fields.items()}).to_dict()["target"]
        return found

    assert target(latency=0.5) == {"latency": 0.5, "format": "ncnn", "imgsz": 320}
    assert target(imgsz=640) == {"latency": 0.6, "format": "ncnn", "imgsz": 640}
    assert target(profile="pi.json") == {"latency": 0.6, "profile": "pi.json"}
    assert target(flops=0.5) == {"flops": 0.5}


def test_a_web_address_is_told_as_that() -> None:
    with pytest.raises(RecipeError, match=r"'https://x\.org/r\.yaml' is a web address\. Download the file"):
        load_recipe("https://x.org/r.yaml")


def test_a_recipe_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbftarget:\r\n  flops: 0.3\r\n")
    assert load_recipe("~/mine.yaml").target.flops == 0.3
