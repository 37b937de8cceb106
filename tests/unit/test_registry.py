"""Registries: names, and the import of the modules that register."""

import sys

import pytest

from helios.registry import Registry, update_all_registries


def function():
    pass


class Thing:
    pass


def test_objects_are_found_by_name():
    registry = Registry("thing")
    assert registry.register(Thing) is Thing
    assert registry.register(function) is function
    assert registry.get("Thing") is Thing
    assert "function" in registry
    assert "other" not in registry
    assert list(registry) == [("Thing", Thing), ("function", function)]
    assert list(registry.keys()) == ["Thing", "function"]
    assert len(registry) == 2
    assert str(registry) == "thing"


def test_register_is_a_decorator_that_leaves_the_object_as_it_is():
    registry = Registry("thing")

    @registry.register
    class Own:
        pass

    assert registry.get("Own") is Own
    assert Own().__class__ is Own


def test_name_that_is_taken_is_an_error_that_names_both_modules():
    registry = Registry("thing")
    registry.register(Thing)
    other = type("Thing", (), {"__module__": "elsewhere"})
    text = f"two objects named 'Thing' in the 'thing' registry: of module {__name__}, "
    with pytest.raises(ValueError, match=text + "and of elsewhere"):
        registry.register(other)
    assert registry.get("Thing") is Thing


def test_suffix_makes_another_name():
    registry = Registry("thing")
    registry.register(Thing)
    other = type("Thing", (), {})
    registry.register(other, suffix="mine")
    assert registry.get("Thing") is Thing
    assert registry.get("Thing_mine") is other
    # The plain name counts first, as in older projects.
    assert registry.get("Thing", suffix="mine") is Thing
    with pytest.raises(ValueError, match="'Thing_mine'"):
        registry.register(other, suffix="mine")


def test_suffix_is_tried_where_the_plain_name_is_unknown():
    registry = Registry("thing")
    registry.register(Thing, suffix="mine")
    assert registry.get("Thing", suffix="mine") is Thing
    with pytest.raises(KeyError, match="no 'Thing' in the 'thing' registry"):
        registry.get("Thing")


@pytest.mark.parametrize(
    ("name", "near"), [("Thin", "Thing"), ("funktion", "function"), ("xyz", "")]
)
def test_unknown_name_is_an_error_that_names_a_near_one(name, near):
    registry = Registry("thing")
    registry.register(Thing)
    registry.register(function)
    text = f"no '{name}' in the 'thing' registry; the nearest is '{near}"
    with pytest.raises(KeyError, match=text):
        registry.get(name)


def test_unknown_name_in_an_empty_registry_is_an_error():
    with pytest.raises(KeyError, match="no 'a' in the 'thing' registry; it is empty"):
        Registry("thing").get("a")


MODULE = """
import seen

@seen.REGISTRY.register
def {name}():
    pass
"""


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Makes files, imports what registers, and says in which order."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "seen.py").write_text(
        "from helios.registry import Registry\nREGISTRY = Registry('seen')\n"
    )
    before = set(sys.modules)

    def run(files, root="project", **options):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        update_all_registries(tmp_path / root, **options)
        return (
            list(sys.modules["seen"].REGISTRY.keys()) if "seen" in sys.modules else []
        )

    yield run
    for name in set(sys.modules) - before:
        del sys.modules[name]


def files_of(*names):
    return {name: MODULE.format(name=f"f{i}") for i, name in enumerate(names)}


def test_modules_that_register_are_imported_in_the_order_of_paths(found):
    files = files_of("project/b.py", "project/a.py", "project/c/d.py")
    assert found(files) == ["f1", "f0", "f2"]
    assert "project.c.d" in sys.modules


def test_packages_register_too_and_under_their_own_names(found):
    files = files_of("project/__init__.py", "project/part/__init__.py")
    assert found(files) == ["f0", "f1"]
    assert {"project", "project.part"} <= set(sys.modules)
    assert "project.part.__init__" not in sys.modules


def test_importing_again_changes_nothing(found):
    files = files_of("project/a.py")
    assert found(files) == ["f0"]
    assert found({}) == ["f0"]


def test_other_modules_are_left_alone(found):
    bad = "raise SystemExit('imported')\n"
    files = {
        "project/script.py": bad,
        "project/registers.py": "raise SystemExit('x') # registered, .registering\n",
        "project/notes.txt": ".register",
        "project/.hidden/a.py": bad + "x.register",
        "project/__pycache__/a.py": bad + "x.register",
        "project/not-a-name/a.py": bad + "x.register",
        "project/2nd.py": bad + "x.register",
        **files_of("project/a.py"),
    }
    assert found(files) == ["f0"]


def test_folders_inside_count_only_with_recurse(found):
    files = files_of("project/a.py", "project/c/d.py")
    assert found(files, recurse=False) == ["f0"]
    assert found(files) == ["f0", "f1"]


def test_prefix_names_the_package_around_the_folder(found):
    files = files_of("outer/project/a.py")
    assert found(files, "outer/project", import_prefix="outer") == ["f0"]
    assert "outer.project.a" in sys.modules


def test_root_may_be_relative_and_a_string(found, tmp_path, monkeypatch):
    found(files_of("project/a.py"))
    monkeypatch.chdir(tmp_path / "project")
    update_all_registries(".")
    assert "project.a" in sys.modules


def test_link_is_imported_under_its_own_name(found, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "link").symlink_to("other")
    assert found(files_of("other/a.py"), "link") == ["f0"]
    assert "link.a" in sys.modules


def test_root_that_is_no_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="`root` must be an existing folder, got"):
        update_all_registries(tmp_path / "none")


def test_import_error_of_a_module_names_its_file(found, tmp_path):
    files = {"project/a.py": "import not_there\nx.register\n"}
    with pytest.raises(ModuleNotFoundError, match="not_there") as caught:
        found(files)
    (note,) = caught.value.__notes__
    assert f"as project.a, from {tmp_path / 'project' / 'a.py'}" in note


def test_wrong_prefix_is_an_import_error_that_says_so(found):
    with pytest.raises(ModuleNotFoundError, match="wrong") as caught:
        found(files_of("project/a.py"), import_prefix="wrong")
    assert "`import_prefix` must name the package" in caught.value.__notes__[0]


def test_other_errors_of_a_module_pass_through(found):
    with pytest.raises(ZeroDivisionError):
        found({"project/a.py": "1 / 0 # .register\n"})
