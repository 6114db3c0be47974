"""MMLU as published: a folder of CSV files, dev/TASK_dev.csv and test/TASK_test.csv (val/), their prompts and their categories.

A row is question, A, B, C, D, answer's letter, without a header. Prompts, tasks and categories are those of
https://github.com/hendrycks/test (Hendrycks et al., 2021): the task's own development questions with their answers, then the question; the
two spaces before the task's name are theirs. Cells are read as they stand (pandas, which their code reads with, makes nan of "None").
"""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path

LETTERS = "ABCD"
SUBJECTS = {
    "STEM": {
        "physics": ("astronomy", "college_physics", "conceptual_physics", "high_school_physics"),
        "chemistry": ("college_chemistry", "high_school_chemistry"),
        "biology": ("college_biology", "high_school_biology"),
        "computer science": ("college_computer_science", "computer_security", "high_school_computer_science", "machine_learning"),
        "math": ("abstract_algebra", "college_mathematics", "elementary_mathematics", "high_school_mathematics", "high_school_statistics"),
        "engineering": ("electrical_engineering",),
    },
    "humanities": {
        "history": ("high_school_european_history", "high_school_us_history", "high_school_world_history", "prehistory"),
        "philosophy": ("formal_logic", "logical_fallacies", "moral_disputes", "moral_scenarios", "philosophy", "world_religions"),
        "law": ("international_law", "jurisprudence", "professional_law"),
    },
    "social sciences": {
        "politics": ("high_school_government_and_politics", "public_relations", "security_studies", "us_foreign_policy"),
        "culture": ("human_sexuality", "sociology"),
        "economics": ("econometrics", "high_school_macroeconomics", "high_school_microeconomics"),
        "geography": ("high_school_geography",),
        "psychology": ("high_school_psychology", "professional_psychology"),
    },
    "other": {
        "other": ("global_facts", "miscellaneous", "professional_accounting"),
        "business": ("business_ethics", "management", "marketing"),
        "health": (
            "anatomy", "clinical_knowledge", "college_medicine", "human_aging", "medical_genetics", "nutrition", "professional_medicine",
            "virology",
        ),
    },
}  # fmt: skip
CATEGORY = {task: category for category, subjects in SUBJECTS.items() for tasks in subjects.values() for task in tasks}
TASKS = tuple(sorted(CATEGORY))  # 57


@dataclass(frozen=True)
class MultipleChoice:
    """A question of a task, its four choices, and the number of the right one."""

    task: str
    question: str
    choices: tuple[str, ...]
    answer: int

    def text(self, answered: bool) -> str:
        """As a prompt has it, with its answer or up to where that would stand."""
        lines = [self.question, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices)), "Answer:"]
        return "\n".join(lines) + (f" {LETTERS[self.answer]}\n\n" if answered else "")


@dataclass(frozen=True)
class MMLU:
    """questions: of all tasks, one after another. shots: each task's development questions. tasks: those that are there."""

    questions: list[MultipleChoice]
    shots: dict[str, list[MultipleChoice]]
    tasks: tuple[str, ...]
    missing: tuple[str, ...] = field(default=())

    def prompt(self, question: MultipleChoice, shots: int) -> str:
        """Up to "Answer:", after so many of the task's development questions."""
        opening = f"The following are multiple choice questions (with answers) about  {question.task.replace('_', ' ')}.\n\n"
        return opening + "".join(one.text(True) for one in self.shots.get(question.task, [])[:shots]) + question.text(False)


def is_mmlu(path: str | Path) -> bool:
    """Whether a folder is laid out as MMLU is: test/ or val/ with TASK_test.csv or TASK_val.csv."""
    return any(any((Path(path) / split).glob(f"*_{split}.csv")) for split in ("test", "val"))


def load_mmlu(folder: str | Path, split: str = "test", shots: int = 5) -> MMLU:
    """The questions of a split ("test" or "val") and up to ``shots`` (0 to 5) development questions of each task.

    A subset of the 57 tasks is taken as it is; ``missing`` names the rest. ValueError: no such files, a task that MMLU does not have,
    a task with fewer development questions than ``shots``, a row that is no question (with its file and line)."""
    if split not in ("test", "val"):
        raise ValueError(f"split must be test or val, not {split!r}: MMLU's dev questions are the examples in the prompts")
    if not isinstance(shots, int) or not 0 <= shots <= 5:
        raise ValueError(f"shots must be a whole number from 0 to 5, not {shots!r}: MMLU has five development questions a task")
    folder = Path(folder)
    files = {path.name.removesuffix(f"_{split}.csv"): path for path in sorted((folder / split).glob(f"*_{split}.csv"))}
    if not files:
        raise ValueError(f"{folder}: no MMLU here: it has {split}/TASK_{split}.csv for each task, and dev/TASK_dev.csv")
    if unknown := [task for task in files if task not in CATEGORY]:
        raise ValueError(f"{files[unknown[0]]}: MMLU has no task {unknown[0]!r}")
    examples = {}
    for task in files if shots else ():
        file = folder / "dev" / f"{task}_dev.csv"
        if not file.is_file():
            raise ValueError(f"{file} is missing: {shots} examples are in each prompt (--shots 0 has none)")
        examples[task] = _read(file, task)
        if len(examples[task]) < shots:
            raise ValueError(f"{file} has {len(examples[task])} questions, and {shots} are wanted: give --shots {len(examples[task])}")
    questions = [question for task, file in files.items() for question in _read(file, task)]
    return MMLU(questions, examples, tuple(files), tuple(task for task in TASKS if task not in files))


def _read(file: Path, task: str) -> list[MultipleChoice]:
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:
            lines = csv.reader(text, strict=True)
            return [_question(row, f"{file}: line {lines.line_num}", task) for row in lines if row]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start})") from None
    except csv.Error as error:
        raise ValueError(f"{file}: line {lines.line_num}: no CSV ({error})") from None


def _question(row: list[str], where: str, task: str) -> MultipleChoice:
    question, *choices, letter = row if len(row) > 1 else [*row, ""]
    if len(choices) != len(LETTERS) or len(letter.strip()) != 1 or letter.strip() not in LETTERS:
        raise ValueError(f"{where}: a row is question, A, B, C, D and the answer's letter, not {len(row)} cells ending in {row[-1][:40]!r}")
    return MultipleChoice(task, question, tuple(choices), LETTERS.index(letter.strip()))
