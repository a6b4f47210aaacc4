"""The fields of a problem file, checked: what is wrong is named by file, place and field."""

from dataclasses import dataclass

from tasks import EvaluationError

REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """One field. kind: int, float, str, bool. A list, where `many`, has at least one item."""

    kind: type
    default: object = REQUIRED
    many: bool = False
    least: float | None = None
    choices: tuple = ()
    about: str = ""

    def check(self, value, where: str):
        if not self.many:
            return self._one(value, where)
        if not isinstance(value, list) or (not value and self.default is REQUIRED):
            raise EvaluationError(f"{where}: has to be a list that is not empty")
        return [self._one(item, f"{where}[{i}]") for i, item in enumerate(value)]

    def _one(self, value, where: str):
        kind = self.kind
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
            raise EvaluationError(f"{where}: {value!r} is not {names[kind]}")
        if self.least is not None and not value >= self.least:  # NaN is refused, too
            raise EvaluationError(f"{where}: {value} is not {self.least} or more")
        if self.choices and value not in self.choices:
            raise EvaluationError(f"{where}: {value!r} is none of {', '.join(self.choices)}")
        return value


@dataclass(frozen=True)
class Levels:
    """[[tokens, groups], …]: so many tokens are shared by each of so many equal parts of the
    requests, one level after the other."""

    default: object = REQUIRED
    many: bool = False

    def check(self, value, where: str):
        number = Field(int, least=1)
        if not isinstance(value, list):
            raise EvaluationError(f"{where}: has to be a list of [tokens, groups]")
        made = []
        for i, level in enumerate(value):
            if not isinstance(level, list) or len(level) != 2:
                raise EvaluationError(f"{where}[{i}]: has to be [tokens, groups]")
            made.append([number.check(item, f"{where}[{i}][{j}]") for j, item in enumerate(level)])
            if i > 0 and made[i][1] % made[i - 1][1]:
                raise EvaluationError(
                    f"{where}[{i}]: {made[i][1]} groups do not divide the {made[i - 1][1]} above"
                )
        return made


def check(problem: dict, fields: dict, where: str) -> dict:
    """The problem with its defaults; raises EvaluationError for what is wrong."""
    if not isinstance(problem, dict):
        raise EvaluationError(f"{where}: has to be a table")
    for name in problem:
        if name not in fields:
            raise EvaluationError(
                f"{where}: there is no field '{name}'; fields are {', '.join(fields)}"
            )
    checked = {}
    for name, field in fields.items():
        if name in problem:
            checked[name] = field.check(problem[name], f"{where}.{name}")
        elif field.default is REQUIRED:
            raise EvaluationError(f"{where}: the field '{name}' is missing")
        else:
            checked[name] = field.default
    return checked
