"""The files of terraform/: what they name exists, what they declare is used, and nothing in them ends live objects.

Where there is a ``terraform``, it has its say on formatting, validations and templates (it needs no provider for that).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.policy_template import names_in, render
from tests.support.store_roles import ENCRYPTION, MODULE, ROLES, template, values_of
from tests.support.terraform_files import Module, load_module, misformatted

EXAMPLES = sorted(path.parent for path in MODULE.glob("examples/*/main.tf"))
FILES = sorted(MODULE.rglob("*.tf"))
needs_terraform = pytest.mark.skipif(shutil.which("terraform") is None, reason="there is no terraform")


@pytest.fixture(scope="module")
def module() -> Module:
    return load_module(MODULE)


def test_everything_named_is_declared_and_everything_declared_is_used(module: Module) -> None:
    named = {name for name in module.references() if name.split(".")[0] not in ("path", "each")}
    declared = (
        {f"var.{name}" for name in module.variables}
        | {f"local.{name}" for name in module.locals}
        | set(module.resources)
    )
    assert named - declared == set()
    used = {name for name in declared if name.split(".")[0] in ("var", "local", "data")}
    assert used - named == set()


def test_variables_and_outputs_are_described(module: Module) -> None:
    for variable in module.variables.values():
        assert variable.has_type and variable.description.endswith("."), variable.name
    assert [each.name for each in module.variables.values() if each.value is None] == [
        "bucket",
        "kms_key_arn",
    ]
    for output in module.outputs.values():
        assert output.description.endswith(".") and output.value is not None, output.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(MODULE)))
def test_formatting(path: Path) -> None:
    assert misformatted(path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a {\n   b = 1\n}\n", "2: indentation"),
        ("a {\n  b = [\n    1,\n    ]\n}\n", "4: indentation"),
        ("a {\n  b = 1\n  long = 2\n}\n", "2: alignment"),
        ("a {\n  b  = 1\n}\n", "2: alignment"),
        ("a {\n  b = 1 \n}\n", "2: blanks"),
        ("a {}", "end of file"),
    ],
)
def test_bad_formatting_is_found(text: str, fault: str) -> None:
    assert fault in misformatted(text)


@pytest.mark.parametrize("directory", EXAMPLES, ids=lambda path: path.name)
def test_examples_fit_the_module(module: Module, directory: Path) -> None:
    example = load_module(directory)
    for call in example.calls().values():
        assert (directory / call["source"]).resolve() == MODULE
        settings = call.keys() - {"source"}
        assert settings <= module.variables.keys()
        assert {name for name, it in module.variables.items() if it.value is None} & settings >= {"bucket"}
        assert {*call.get("users", ()), *call.get("role_trust_policies", {})} <= set(ROLES)
    for output in example.outputs.values():
        head, called, name = str(output.value).strip("${}").split(".")
        assert head == "module" and called in example.calls() and name in module.outputs
    known = {f"module.{name}" for name in example.calls()} | set(example.resources)
    assert example.references() <= known


def test_both_kinds_of_use_are_shown() -> None:
    assert {path.name for path in EXAMPLES} == {"kms-object-lock", "single-cluster"}


def test_no_rule_ends_the_life_of_live_objects(module: Module) -> None:
    """Only garbage collection knows what is garbage. Old versions and markers of what was deleted may go."""
    rules = module.resources["aws_s3_bucket_lifecycle_configuration.store"]["rule"]
    assert {name for rule in rules for name in rule} == {
        "id",
        "status",
        "filter",
        "abort_incomplete_multipart_upload",
        "noncurrent_version_expiration",
        "expiration",
    }
    expirations = [each for rule in rules for each in rule.get("expiration", ())]
    assert expirations == [{"expired_object_delete_marker": True}]


def test_the_bucket_is_closed_and_not_destroyed_by_mistake(module: Module) -> None:
    blocked = module.resources["aws_s3_bucket_public_access_block.store"]
    names = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert [blocked[name] for name in names] == [True] * 4
    assert "force_destroy" not in module.resources["aws_s3_bucket.store"]


def test_roles_and_policy_files_are_the_same(module: Module) -> None:
    assert {path.name.split(".")[0] for path in (MODULE / "policies").iterdir()} == {*ROLES, "bucket"}
    for role in ROLES:
        assert role in str(module.locals["roles"])
    rendering = module.locals["rendering"]
    assert isinstance(rendering, dict)
    assert rendering.keys() == values_of("b").keys()
    assert frozenset().union(*(names_in(template(each)) for each in (*ROLES, "bucket"))) == rendering.keys()


@pytest.mark.parametrize("role", ROLES)
def test_a_policy_fits_into_iam(role: str) -> None:
    """A managed policy has at most 6,144 characters without blanks."""
    values = values_of("b" * 63, "p" * 200, ENCRYPTION)
    packed = json.dumps(json.loads(render(template(role), values)), separators=(",", ":"))
    assert len(packed) <= 6144


@pytest.mark.parametrize(
    "text", ["${a.b}", "${upper(a)}", "%{ for x in a }", "%{ if b }", "${a", '%{ if a == "1" }x%{ endif }']
)
def test_templates_that_are_not_understood_are_refused(text: str) -> None:
    with pytest.raises((ValueError, KeyError)):
        render(text, {"a": "1", "b": True})


def terraform(directory: Path, *args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["terraform", f"-chdir={directory}", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={"PATH": "/usr/bin:/bin:/usr/local/bin", "HOME": str(directory), "CHECKPOINT_DISABLE": "1"},
    )


@needs_terraform
def test_terraform_finds_nothing_to_format() -> None:
    result = terraform(MODULE, "fmt", "-check", "-recursive", "-no-color")
    assert (result.returncode, result.stdout) == (0, "")


@needs_terraform
@pytest.mark.parametrize("encrypted", [False, True])
def test_terraform_renders_the_same(tmp_path: Path, encrypted: bool) -> None:
    values = values_of("b", "a/b", ENCRYPTION if encrypted else None, create_only=encrypted)
    names = (*ROLES, "bucket")
    calls = ", ".join(
        f'jsondecode(templatefile("{MODULE}/policies/{name}.json.tftpl", {json.dumps(values)}))'
        for name in names
    )
    result = terraform(tmp_path, "console", stdin=f"jsonencode(jsonencode([{calls}]))\n")
    assert result.returncode == 0, result.stderr
    rendered = json.loads(json.loads(json.loads(result.stdout)))
    assert rendered == [json.loads(render(template(name), values)) for name in names]


KEY = "arn:aws:kms:eu-central-1:111122223333:key/1234"
GOOD: dict[str, object] = {"bucket": "some-bucket"}


@needs_terraform
@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({}, None),
        ({"prefix": "a/b.c", "users": ["reader"], "role_trust_policies": {"drill": "{}"}}, None),
        ({"encryption": "given-key", "kms_key_arn": KEY}, None),
        ({"object_lock": True, "object_lock_mode": "COMPLIANCE"}, None),
        ({"bucket": "Some_Bucket"}, "A bucket's name"),
        ({"prefix": "/a"}, "The prefix consists"),
        ({"prefix": "a//b"}, "The prefix consists"),
        ({"encryption": "none"}, "Encryption is"),
        ({"encryption": "given-key"}, "A KMS key is given"),
        ({"kms_key_arn": KEY}, "A KMS key is given"),
        ({"encryption": "given-key", "kms_key_arn": "alias/mine"}, "not of an alias"),
        ({"object_lock": True, "versioning": False}, "Object Lock needs versioning"),
        ({"object_lock_mode": "SOMEHOW"}, "The mode is"),
        ({"noncurrent_days": 0}, "at least 1"),
        ({"abort_multipart_days": 1.5}, "A whole number"),
        ({"users": ["root"]}, "The users are"),
        ({"role_trust_policies": {"archivist": "{}"}}, "The roles are"),
        ({"role_trust_policies": {"archiver": "ec2"}}, "Trust policies are JSON"),
    ],
)
def test_terraform_checks_the_variables(
    tmp_path: Path, settings: dict[str, object], complaint: str | None
) -> None:
    """The variables alone, which need no provider."""
    shutil.copy(MODULE / "variables.tf", tmp_path)
    (tmp_path / "x.auto.tfvars.json").write_text(json.dumps(GOOD | settings))
    result = terraform(tmp_path, "plan", "-no-color", "-input=false", "-lock=false")
    said = " ".join(result.stderr.replace("│", " ").split())
    assert (result.returncode == 0) == (complaint is None), said
    assert complaint is None or complaint in said


Change = Callable[[str], str]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda text: text.replace("var.tags", "var.tag"), "var.tag"),
        (lambda text: text.replace("local.kms_key_arn", "local.key"), "local.key"),
        (
            lambda text: text.replace("aws_s3_bucket.store.id", "aws_s3_bucket.stores.id"),
            "aws_s3_bucket.stores",
        ),
    ],
)
def test_what_is_not_declared_is_found(tmp_path: Path, change: Change, what: str) -> None:
    """The check above finds what it is there for."""
    for path in MODULE.glob("*.tf"):
        (tmp_path / path.name).write_text(change(path.read_text()))
    broken = load_module(tmp_path)
    declared = {f"var.{name}" for name in broken.variables} | {f"local.{name}" for name in broken.locals}
    assert what in broken.references() - declared - set(broken.resources)
