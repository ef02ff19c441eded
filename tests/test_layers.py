"""The layers of the package, read from its import graph: imports inside functions count too.

`LAYERS` is the table; docs and CONTRIBUTING.md quote it. A module imports its own layer, the layers that its entry
names, and whatever these may import. Change the table only with a reason in docs/explanation/decisions.md.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

NAME = "hf_segformer"
PACKAGE = Path(__file__).resolve().parent.parent / NAME

# Files that `save_pretrained` ships with every checkpoint.
SHIPPED = {
    "configuration_segformer": (),
    "dispatch_segformer": (),
    "image_io_segformer": (),
    "shards_segformer": (),
    "cpu_runtime_segformer": ("configuration_segformer", "dispatch_segformer"),
    "upsampling_segformer": ("configuration_segformer", "dispatch_segformer", "cpu_runtime_segformer"),
    "folding_segformer": ("upsampling_segformer",),
    "cpu_encoder_segformer": ("upsampling_segformer",),
    "cpu_decode_head_segformer": ("folding_segformer", "cpu_encoder_segformer"),
    "modeling_segformer": ("cpu_encoder_segformer", "cpu_decode_head_segformer", "shards_segformer"),
    "image_processing_segformer": ("upsampling_segformer", "image_io_segformer"),
}
# For each layer the layers directly below it.
LAYERS = {
    **SHIPPED,
    "version": (),
    "files": (),
    "config": (),
    "locks": ("files",),
    "progress": (),
    "visualization": (),
    "auto_classes": ("modeling_segformer", "image_processing_segformer"),
    "base": ("version", "files", "config", "locks", "progress", "visualization", "auto_classes"),
    "kernels": ("base",),
    "conversion": ("base",),
    "data": ("base",),
    "inference": ("conversion", "data"),
    "cluster": ("inference",),
    "geo": ("inference",),
    "medical": ("inference",),
    "video": ("inference",),
    "evaluation": ("inference",),
    "export": ("evaluation",),
    "hub": ("conversion",),
    "training": ("evaluation", "hub"),
    "app": ("inference", "hub"),
    "benchmarking": ("conversion",),
    "cli": ("cluster", "geo", "medical", "video", "export", "training", "app", "benchmarking"),
    "__main__": ("cli",),
    "__init__": ("kernels", "training"),
}


def modules():
    """Dotted names within the package, and files: `cli.main`, `__init__` and so on."""
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


MODULES = modules()


@cache
def tree_of(module):
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def layer_of(module):
    return module.partition(".")[0]


def resolve(target):
    """The module that a dotted name within the package means: itself, or the `__init__` of a folder."""
    if target in MODULES:
        return target
    return f"{target}.__init__" if target and f"{target}.__init__" in MODULES else None if target else "__init__"


@cache
def imports_of(module):
    """(imported module, imported names) of every import of the package itself, anywhere in a file."""
    found = []
    folder = module.split(".")[:-1]
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                parts = [*folder[: len(folder) - node.level + 1], *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == NAME:
                parts = node.module.split(".")[1:]
            else:
                continue
            base = ".".join(filter(None, parts))
            for alias in node.names:  # `from . import module` or `from .module import name`
                child = resolve(f"{base}.{alias.name}".strip("."))
                found.append((child, None) if child else (resolve(base), alias.name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == NAME:
                    found.append((resolve(".".join(alias.name.split(".")[1:])), None))
    return found


@cache
def below(layer):
    """All layers that a layer may import."""
    return {layer}.union(*(below(lower) for lower in LAYERS[layer]))


def public_names(module):
    """The names of a module's `__all__`; None if it has none."""
    for node in tree_of(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def defined_names(module):
    """Names that a module binds other than by import; those of functions are harmless."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_every_module_has_a_layer():
    assert {layer_of(module) for module in MODULES} <= set(LAYERS)
    shipped = {module for module in MODULES if module.endswith("_segformer") and "." not in module}
    assert shipped == set(SHIPPED)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    layer = layer_of(module)
    wrong = {target for target, _ in imports_of(module) if target and layer_of(target) not in below(layer)}
    allowed = sorted(below(layer) - set(SHIPPED)) if layer not in SHIPPED else sorted(below(layer))
    assert not wrong, f"{module} ({layer}) imports {sorted(wrong)}; expected only {allowed} and shipped files"


@pytest.mark.parametrize("module", MODULES)
def test_imports_exist_and_name_what_their_home_defines(module):
    """No import of a name from a module that has itself imported it."""
    wrong = []
    for target, name in imports_of(module):
        if target is None:
            wrong.append("a module that does not exist")
        elif name is not None and name not in defined_names(target):
            wrong.append(f"{name} from {target}")
    assert not wrong, f"{module} imports {', '.join(wrong)}: import it from the module that defines it"


@pytest.mark.parametrize("module", [module for module in MODULES if not module.endswith(("__init__", "__main__"))])
def test_all_lists_what_the_module_defines(module):
    names = public_names(module)
    assert names is not None, f"{module} has no __all__"
    foreign = sorted(set(names) - defined_names(module))
    assert not foreign, f"the __all__ of {module} lists {foreign}, which it does not define"


@pytest.mark.parametrize("module", [module for module in MODULES if module.endswith(".__init__")])
def test_init_of_a_folder_is_a_docstring(module):
    body = tree_of(module).body
    assert len(body) == 1, f"{module} holds more than its docstring"
    assert ast.get_docstring(tree_of(module))


@pytest.mark.parametrize("module", SHIPPED)
def test_shipped_files_import_siblings_by_name_only(module):
    """Transformers copies what `from .sibling import name` names, and nothing else."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"{module}: {ast.unparse(node)}"
            assert node.module in SHIPPED, f"{module}: {ast.unparse(node)}"
    assert all(target in SHIPPED for target, _ in imports_of(module))


def test_there_is_no_import_cycle():
    done, path = set(), []

    def visit(module):
        if module in path:
            pytest.fail(f"import cycle: {' -> '.join([*path[path.index(module) :], module])}")
        if module in done:
            return
        path.append(module)
        for target, _ in imports_of(module):
            if target and target != module:
                visit(target)
        done.add(path.pop())

    for module in MODULES:
        visit(module)


def test_the_table_of_layers_has_no_cycle():
    for layer, lower in LAYERS.items():
        assert all(layer not in below(each) for each in lower), layer


# --- The checks can fail ----------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package of given sources the one that is checked."""

    def make(**sources):
        for name, source in sources.items():
            path = tmp_path.joinpath(*name.split("__", 1) if not name.startswith("_") else [name]).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)
        monkeypatch.setitem(globals(), "PACKAGE", tmp_path)
        monkeypatch.setitem(globals(), "MODULES", modules())
        for cached in (tree_of, imports_of):
            cached.cache_clear()

    yield make
    for cached in (tree_of, imports_of):
        cached.cache_clear()


def test_an_import_that_points_up_is_found_inside_a_function(package):
    package(data__readers="def read():\n    from ..inference import tiling\n", inference__tiling="")
    with pytest.raises(AssertionError, match=r"data.readers \(data\) imports \['inference.tiling'\]"):
        test_imports_point_down("data.readers")


def test_an_absolute_import_and_the_package_itself_are_found(package):
    package(
        data__readers="import hf_segformer.cli.main\nfrom hf_segformer import SegFormerConfig",
        cli__main="",
        __init__="",
    )
    assert imports_of("data.readers") == [("cli.main", None), ("__init__", "SegFormerConfig")]
    with pytest.raises(AssertionError, match="imports"):
        test_imports_point_down("data.readers")


def test_a_re_export_is_found(package):
    package(
        config="from .files import write\n__all__ = ['write']\n",
        files="def write(): ...\n",
        data__a="from ..config import write",
    )
    with pytest.raises(AssertionError, match="does not define"):
        test_all_lists_what_the_module_defines("config")
    with pytest.raises(AssertionError, match="write from config"):
        test_imports_exist_and_name_what_their_home_defines("data.a")


def test_a_cycle_is_found(package):
    package(data__a="from .b import x", data__b="from . import a\nx = 1")
    with pytest.raises(pytest.fail.Exception, match=r"import cycle: data\.a -> data\.b -> data\.a"):
        test_there_is_no_import_cycle()
