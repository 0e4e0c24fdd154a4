"""python -m pytest --mine=FILE: your own functions under the properties of the chapters.

If FILE does not exist, it is written: the functions of the chapters' ideas, without their bodies.
If it does, each of its functions takes the place of the function with the same name and parameters
in each chapter, and the properties that are marked about("its name") run. Each function is put in
place alone, so that a wrong one does not make the properties of another fail.
"""

import ast
import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import textwrap
import traceback
import types
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import Phase, settings

HERE = Path(__file__).parent
CHAPTERS = {file.stem[:2]: file for file in sorted(HERE.parent.glob("0*_*.py"))}


def pytest_addoption(parser):
    parser.addoption("--mine", metavar="FILE", default="tests",  # see .pytest.ini
                     help="run the properties of the chapters on the functions of FILE; if there "
                          "is no such file, write one to fill in")
    parser.addoption("--chapter", metavar="NN", nargs="+", choices=list(CHAPTERS),
                     default=list(CHAPTERS), help="with --mine: these chapters alone, as in 01 07")


def pytest_configure(config):
    if config.getoption("mine", "tests") != "tests":
        path, numbers = Path(config.getoption("mine")), config.getoption("chapter")
        path = config.invocation_params.dir / path.expanduser()
        if not path.exists():
            path.write_text(skeleton(numbers), encoding="utf-8")
            pytest.exit(f"wrote {path.name}: replace each `raise NotImplementedError` by your own "
                        "code, then run the same command again", returncode=0)
        config.pluginmanager.register(Mine(config, path, numbers))


def book(number):
    """The functions of a chapter that a student may write: {name: its definition, as ast}.

    They stand before "model", or in 08 between "the idea" and "main"; a claim of 08 has no
    parameters and is none of them.
    """
    text = CHAPTERS[number].read_text(encoding="utf-8")
    sections = re.split(r"(?m)^# --- ", text)[1:]
    names = [section.split(" -")[0] for section in sections]
    first, end = (0, names.index("model")) if "model" in names else (1, names.index("main"))
    found = ast.parse("# --- ".join(["", *sections[first:end]])).body
    return {f.name: f for f in found if isinstance(f, ast.FunctionDef) and f.args.args
            and not f.name.startswith(("_", "plot_"))}


def constants(number):
    """The constants of a chapter that its functions use, as lines of code: numbers and tensors."""
    functions = ast.Module([*book(number).values()], [])
    used = {node.id for node in ast.walk(functions) if isinstance(node, ast.Name)}
    lines = ast.parse(CHAPTERS[number].read_text(encoding="utf-8")).body
    return [ast.unparse(line) for line in lines if isinstance(line, ast.Assign)
            and getattr(line.targets[0], "id", "a").isupper() and line.targets[0].id in used
            and {node.id for node in ast.walk(line.value) if isinstance(node, ast.Name)}
            <= {"torch", "math"}]


def skeleton(numbers):
    """The text of a file with the functions of these chapters, each without its body."""
    parts = ['"""Write the body of each function. Then: python -m pytest --mine=THIS_FILE\n\n'
             'What you do not want to write you may delete.\n"""\n\nimport math\n\nimport torch\n'
             "from torch.nn import functional as F\n"]
    written = set()
    for number in numbers:
        functions = {name: f for name, f in book(number).items() if name not in written}
        written |= functions.keys()
        parts += [f"\n\n# --- chapter {number} ---\n", *(f"\n{c}" for c in constants(number)),
                  "\n" * bool(constants(number))]
        for name, f in functions.items():
            lines = [f"\n\ndef {name}({ast.unparse(f.args)}):\n"]
            if doc := ast.get_docstring(f):
                lines.append(textwrap.indent(f'r"""{doc}\n"""\n' if "\n" in doc
                                             else f'r"""{doc}"""\n', "    "))
            parts += [re.sub(r"(?m)^ +$", "", "".join(lines)), "    raise NotImplementedError\n"]
    return "".join(parts)


def load(path):
    """The functions that the file defines, by name."""
    module = sys.modules["students_file"] = types.ModuleType("students_file")
    module.__file__ = str(path)
    sys.path.append(str(path.parent))
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, \
                contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise pytest.UsageError(f"{path.name} does not import: {in_one_line(error, path)}")
    return {name: f for name, f in vars(module).items() if inspect.isfunction(f)
            and f.__module__ == module.__name__ and not name.startswith("_")}


def parameters(function):
    """What a student's function must share with the chapter's: names, order, which have defaults.
    """
    return [(p.name, p.kind, p.default is p.empty)
            for p in inspect.signature(function).parameters.values()]


def places(functions, numbers):
    """{(chapter, name): the student's function} for all that are in the book."""
    known, found = {number: book(number) for number in numbers}, {}
    names = {name for functions in known.values() for name in functions}
    for name, own in functions.items():
        theirs = {number: getattr(importlib.import_module(CHAPTERS[number].stem), name)
                  for number in numbers if name in known[number]}
        fitting = [n for n, f in theirs.items() if parameters(f) == parameters(own)]
        if theirs and not fitting:
            forms = {f"{name}{inspect.signature(f)}": number for number, f in theirs.items()}
            raise pytest.UsageError(f"{name}{inspect.signature(own)} should be " + " or ".join(
                f"{form} as in chapter {number}" for form, number in forms.items()))
        if near := not theirs and difflib.get_close_matches(name, names - functions.keys(), 1,
                                                            0.85):
            raise pytest.UsageError(f"{name} is in no chapter; did you mean {near[0]}? If it is "
                                    f"a helper, call it _{name}")
        found |= {(number, name): own for number in fitting}
    if not found:
        raise pytest.UsageError("the file has no function of the chapters"
                                + f", only {', '.join(functions)}" * bool(functions))
    return found


def in_one_line(error, path):
    """What went wrong, and in which line of the student's file if it was there."""
    text = re.sub(r"Mismatched elements.*?%\) | (Greatest r|R)elative.*| assert .*| \+ where.*",
                  "", " ".join(str(error).split()))
    lines = [f" (line {at.lineno} of {path.name})" for at in
             traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
    if not isinstance(error, (AssertionError, pytest.fail.Exception)):
        text = f"{type(error).__name__}: {text}"
    return textwrap.shorten(text, 200) + "".join(lines[-1:])


def cases(item):
    """The arguments of a case of a parametrised test."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def failing_input(item, error):
    """What the property was asked for when it failed: by hypothesis, or by parametrize."""
    found = re.search(r": \w+\(\n(.*?),?\n\)", "\n".join(getattr(error, "__notes__", [])),
                      re.DOTALL)
    if found:
        return " ".join(found[1].split())
    show = lambda value: inspect.getsource(value).strip(" ,\n") if callable(value) else repr(value)
    return ", ".join(f"{name}={show(value)}" for name, value in cases(item).items()
                     if name != "own")


class Mine:
    """What --mine adds to pytest."""

    def __init__(self, config, path, numbers):
        self.path, functions = path, load(path)
        self.functions = places(functions, numbers)
        known = {name for number in CHAPTERS for name in book(number)}
        self.helpers = [name for name in functions if name not in known]
        # (chapter, name): {is it an edge case?: {property: its first failure, or None}}
        self.outcomes = {place: {False: {}, True: {}} for place in self.functions}
        config.args = sorted({str(HERE / f"test_{CHAPTERS[number].stem}.py")
                              for number, _ in self.functions})
        config.option.tbstyle, config.option.disable_warnings = "no", True
        settings.register_profile(
            "mine", settings.get_profile("everyday"), derandomize=True,
            max_examples=10,  # a student's function may be a slow loop in Python
            database=None, print_blob=False, report_multiple_bugs=False,
            phases=[Phase.explicit, Phase.generate, Phase.shrink])
        settings.load_profile("mine")

    def pytest_generate_tests(self, metafunc):
        """A property runs once for each of the student's functions that it is about."""
        number = metafunc.module.__name__[5:7]  # of test_01_vae
        mark = metafunc.definition.get_closest_marker("about")
        names = [name for name in (mark.args if mark else ()) if (number, name) in self.functions]
        if names:
            metafunc.fixturenames.append("own")  # no test asks for it: it only multiplies them
            metafunc.parametrize("own", [(number, name) for name in names], ids=names)

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if "own" in cases(item)]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        number, name = place = cases(item)["own"]
        failure, chapter = None, sys.modules[CHAPTERS[number].stem]
        try:
            with mock.patch.object(chapter, name, self.functions[place]):
                return (yield)
        except (Exception, pytest.fail.Exception) as error:
            case = failing_input(item, error)
            failure = NotImplementedError if isinstance(error, NotImplementedError) else \
                f"for {case}: " * bool(case) + in_one_line(error, self.path)
            raise
        finally:
            edge = item.get_closest_marker("about").kwargs.get("edge", False)
            outcome = self.outcomes[place][edge]
            outcome[item.originalname] = outcome.get(item.originalname) or failure

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        terminalreporter.reportchars = ""  # pytest's own list of failures would repeat this one
        if exitstatus == pytest.ExitCode.USAGE_ERROR:
            return
        say = terminalreporter.line
        for (number, name), outcomes in self.outcomes.items():
            title = f"{name} (chapter {number})"
            every = [*outcomes[False].values(), *outcomes[True].values()]
            if not every:
                say(f"{title}: the chapter has no property for it")
            elif NotImplementedError in every:
                say(f"{title}: not written yet")
            elif not any(every):
                say(f"{title}: all {len(every)} properties hold", green=True)
            else:
                for kind, outcome in (("formula", outcomes[False]), ("edge cases", outcomes[True])):
                    failures = {test: text for test, text in outcome.items() if text}
                    if failures:
                        say(f"{title}, {kind}: {len(failures)} of {len(outcome)} fail", red=True)
                    elif outcome:
                        say(f"{title}, {kind}: all {len(outcome)} hold", green=True)
                    for test, text in failures.items():
                        say(f"  {test.removeprefix('test_').replace('_', ' ')}, {text}")
        if self.helpers:
            say(f"in no chapter, not tested: {', '.join(self.helpers)}")
