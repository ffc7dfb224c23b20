import pytest

from recipe_runner.problems.errors import UserError
from recipe_runner.recipe.document import parse_document, parse_scalar, read_document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("1.e-5", 1e-5),
        (".5", 0.5),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("~", None),
        ("null", None),
        ("", None),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("1e", "1e"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(text, value):
    result = parse_scalar(text)
    assert result == value
    assert type(result) is type(value)


def test_quoted_scalars_are_strings():
    assert parse_document("a: '2e-4'\nb: \"no\"\nc: |\n  3\n", "f").values == {"a": "2e-4", "b": "no", "c": "3\n"}


def test_marks_point_at_keys_and_values():
    document = parse_document("a:\n  b: 1\n  c: [x,  y]\n", "f")
    assert (document.key_marks["a", "b"].line, document.key_marks["a", "b"].column) == (2, 3)
    assert (document.value_marks["a", "b"].line, document.value_marks["a", "b"].column) == (2, 6)
    assert (document.value_marks["a", "c", 1].line, document.value_marks["a", "c", 1].column) == (3, 11)


def test_aliases_are_copied_with_the_marks_of_their_anchor():
    document = parse_document("a: &x {b: [1, 2]}\nc: *x\n", "f")
    assert document.values == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}}
    assert document.value_marks["c", "b", 1] == document.value_marks["a", "b", 1]
    document.values["c"]["b"].append(3)
    assert document.values["a"] == {"b": [1, 2]}


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: *nothing", "a: " + "[" * 60 + "]" * 60])
def test_cycles_and_depth_are_refused(text):
    with pytest.raises(UserError):
        parse_document(text, "f")


def test_a_huge_number_is_no_crash():
    (problem,) = parse_document("a: " + "9" * 5000, "f").problems
    assert problem.code == "not-finite"


def test_a_large_file_is_refused_before_it_is_parsed(tmp_path):
    file = tmp_path / "large.yaml"
    file.write_bytes(b"a: 1\n" * 300_000)
    with pytest.raises(UserError, match="file-too-large"):
        read_document(file)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    file = tmp_path / "bom.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_document(file).values == {"a": 1}
