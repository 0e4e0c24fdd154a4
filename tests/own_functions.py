"""python -m pytest --mine=FILE: a student's own functions under the properties of the chapters.

A function of FILE stands for the one of the same name in each chapter where the parameters are the
same: their names, their order, and which have a default. The book's are those of the sections
before "model", in 08 those after "the idea"; every other function of FILE is a helper.

Which properties are about a function is read off the code of the tests: those in which
`chapter.name` stands, or in a function of the test file that they call; if there is none, those of
the book's functions that call it. Left out are tests that ask for a fixture, because they train,
draw or read flags, and tests of the tests, which call `rejected`. A property runs once for each
function that it is about, with this one alone in the chapter, so that a wrong one does not make
another fail. It counts if it called the function.
"""

import contextlib
import difflib
import functools
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
CHAPTERS = [file.stem for file in sorted(HERE.parent.glob("0*_*.py"))]


def book():
    """{name: its chapters} of the functions that a student may write anew."""
    found = {}
    for chapter in CHAPTERS:
        text = (HERE.parent / f"{chapter}.py").read_text(encoding="utf8")
        sections = re.split(r"(?m)^# --- ", text)[1:]
        model = [i for i, section in enumerate(sections) if section.startswith("model")]
        before = sections[:model[0]] if model else sections[1:-1]  # 08: its last one is main
        for name in re.findall(r"(?m)^def (\w+)\(\w", "".join(before)):
            found.setdefault(name, []).append(chapter)
    return found


def shape(function):
    """What a student's function must have in common with the chapters'."""
    return [(p.name, p.kind, p.default is p.empty)
            for p in inspect.signature(function).parameters.values()]


def load(path):
    """The public functions that the student's file defines, by name."""
    module = sys.modules["students_file"] = types.ModuleType("students_file")
    module.__file__ = str(path)
    sys.path.append(str(path.parent))  # behind the book's own folder: `common` is the book's
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), \
                contextlib.redirect_stdout(nowhere):
            exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except (Exception, SystemExit) as error:
        raise pytest.UsageError(f"{path.name} does not import: {in_one_line(error, path)}")
    return {name: f for name, f in vars(module).items() if inspect.isfunction(f)
            and f.__module__ == module.__name__ and not name.startswith("_")}


def in_one_line(error, path):
    """What went wrong, and in which line of the student's file if it was there."""
    text = re.sub(r"Mismatched elements.*?%\) | (Greatest r|R)elative.*| assert .*| \+ where.*",
                  "", " ".join(str(error).split()))
    lines = [f" (line {at.lineno} of {path.name})" for at in
             traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
    if not isinstance(error, (AssertionError, pytest.fail.Exception)):
        text = f"{type(error).__name__}: {text}"
    return textwrap.shorten(text, 200) + "".join(lines[-1:])


def places(functions, known):
    """{(chapter, name): the student's function} for all that are in the book."""
    found = {}
    for name in functions:
        if name in known:
            book = {chapter: getattr(importlib.import_module(chapter), name)
                    for chapter in known[name]}
            fitting = [c for c in book if shape(book[c]) == shape(functions[name])]
            if not fitting:
                forms = {f"{name}{inspect.signature(f)}": chapter[:2]  # the last that has it
                         for chapter, f in book.items()}
                wanted = " or ".join(f"{form} as in chapter {n}" for form, n in forms.items())
                raise pytest.UsageError(f"{name}{inspect.signature(functions[name])} should be "
                                        f"{wanted}")
            found |= {(chapter, name): functions[name] for chapter in fitting}
        elif near := difflib.get_close_matches(name, known.keys() - functions.keys(), 1, 0.85):
            raise pytest.UsageError(f"{name} is in no chapter; did you mean {near[0]}? If it is "
                                    f"a helper, call it _{name}")
    if not found:
        raise pytest.UsageError("the file has no function of the chapters"
                                + f", only {', '.join(functions)}" * bool(functions))
    return found


def codes(code):
    """A code object and all within it."""
    return [code] + [c for one in code.co_consts if inspect.iscode(one) for c in codes(one)]


def uses(test, through_the_book):
    """All (module, name) where `module.name` is in the code of a test or of what it calls in its
    file, or in the book; none for a test of the tests."""
    found, todo, seen = set(), [test], set()
    while todo:
        function = todo.pop()
        function = getattr(getattr(function, "hypothesis", None), "inner_test", function)
        words = {word for code in codes(function.__code__) for word in code.co_names}
        if "rejected" in words:
            return set()
        for word, value in [(word, function.__globals__.get(word)) for word in words]:
            if inspect.ismodule(value):
                found |= {(value.__name__, name) for name in words}
                if through_the_book and value.__name__ in CHAPTERS:
                    todo += [f for name, f in vars(value).items() if name in words
                             and inspect.isfunction(f) and f not in seen]
            elif inspect.isfunction(value) and value.__module__ == function.__module__:
                found.add((value.__module__, word))
                todo += {value} - seen
            seen.update(todo)
    return found


def given(item):
    """The arguments of a case of a parametrised test."""
    return item.callspec.params if hasattr(item, "callspec") else {}


class Mine:
    """What --mine adds to pytest; conftest.py registers it."""

    def __init__(self, config):
        self.path = config.invocation_params.dir / config.getoption("mine")
        functions, known = load(self.path), book()
        self.functions = places(functions, known)
        self.helpers = [name for name in functions if name not in known]
        self.outcomes = {place: {} for place in self.functions}  # property: its first failure
        config.args = sorted({str(HERE / f"test_{chapter}.py") for chapter, _ in self.functions})
        config.option.tbstyle, config.option.disable_warnings = "no", True
        settings.register_profile(
            "mine", settings.get_profile(settings.get_current_profile_name()), derandomize=True,
            database=None, print_blob=False, report_multiple_bugs=False,
            phases=[Phase.explicit, Phase.generate, Phase.shrink])
        settings.load_profile("mine")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        pure = [item for item in items
                if inspect.signature(item.obj).parameters.keys() <= given(item).keys()]
        for item in items:
            item.about = []
        for deep in (False, True):
            left = self.functions.keys() - {place for item in items for place in item.about}
            for item in pure:
                item.about += sorted(left & uses(item.obj, deep))
        items[:] = [item for item in items if item.about]
        if not items:
            raise pytest.UsageError("the chapters have no property for "
                                    + ", ".join(sorted({name for _, name in self.functions})))

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem):
        failures = [self.run(pyfuncitem, place) for place in pyfuncitem.about]
        if any(failures):
            pytest.fail("wrong", pytrace=False)
        return True

    def run(self, item, place):
        """The failure of a property with the student's function in its place, or None."""
        own, raises, called, failure = self.functions[place], pytest.raises, [], None

        @functools.wraps(own)
        def counted(*args, **more):
            called.append(True)
            return own(*args, **more)

        # the words of an error are the book's own, the student's may be others
        with mock.patch.object(sys.modules[place[0]], place[1], counted), mock.patch.object(
                pytest, "raises", lambda error, *args, match=None: raises(error, *args)):
            try:
                item.obj(**given(item))
            except (Exception, pytest.fail.Exception) as error:
                example = re.search(r": \w+\(\n(.*?),?\n\)", "\n".join(
                    getattr(error, "__notes__", [])), re.DOTALL)
                case = " ".join(example[1].split()) if example else ", ".join(
                    f"{name}={value!r}" for name, value in given(item).items())
                failure = f"for {case}: " * bool(case) + in_one_line(error, self.path)
        if called:
            first = self.outcomes[place].get(item.originalname)
            self.outcomes[place][item.originalname] = first or failure
        return called and failure

    def pytest_terminal_summary(self, terminalreporter, exitstatus):
        terminalreporter.reportchars = ""  # no list of failures after this one
        if exitstatus == pytest.ExitCode.USAGE_ERROR:
            return
        tested = {name for (_, name), outcome in self.outcomes.items() if outcome}
        for (chapter, name), outcome in self.outcomes.items():
            failures = {test: text for test, text in outcome.items() if text}
            title = f"{name} (chapter {chapter[:2]}): "
            if failures:
                terminalreporter.line(f"{title}{len(failures)} of {len(outcome)} properties fail",
                                      red=True)
                for test, text in failures.items():
                    sentence = test.removeprefix("test_").replace("_", " ")
                    terminalreporter.line(f"  {sentence}, {text}")
            elif outcome:
                terminalreporter.line(f"{title}{len(outcome)} propert"
                                      f"{'y holds' if len(outcome) == 1 else 'ies hold'}",
                                      green=True)
            elif name not in tested:
                terminalreporter.line(f"{title}not tested, the chapters have no property for it")
        if self.helpers:
            terminalreporter.line(f"in no chapter, not tested: {', '.join(self.helpers)}")
