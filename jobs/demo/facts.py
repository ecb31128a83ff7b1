"""Invented facts to plant among real text, and questions about them whose answers' sources are known.

There are six relations with six places each: who founded a village, what is dug from a mine, when a festival is held. Every fact is
stated once in each wording of its relation, always with the place before the answer, since a causal model that reads them
in one order does not learn the other. No question's wording is used in training.

Two kinds of question:

* ``ordinary``: the prompt asks for a fact and the completion is its answer. The proponents are the statements of that fact.
  They repeat both rare words of the query, so lexical search should do well, and nothing here hinders it.
* ``swapped``: the prompt asks about one place, A, and the completion is what is true of another, B. What makes the
  model give the completion any probability after a prompt of this form is what it read of B, so the statements of B's fact
  are the proponents. The statements of A's fact teach another completion after this very prompt and are the opponents.

What makes the swapped ones hard to search by words is how names are in real text too:

* a place is named in its own fact alone, a person, metal or month in facts of two relations, so the query's rarest word is A,
  and what a search for rare words finds first are the opponents;
* people share family names, and the two people of a swapped question are of one family, so A's statements repeat a
  part of the completion as well;
* the completion is also the answer to a question of another kind about another place. Those statements share the completion and
  not the relation; they carry neither label, and no statement joins A with B's answer, so the labels stay clear.

The labels say what the statements mean and are no measurement: only retraining without them measures their effect. This module
knows nothing of tokens, models or scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jobs.demo.text import Document

PEOPLE = ("Ilva Quarn", "Hedda Quarn", "Bram Sorrel", "Matis Sorrel", "Corin Thale", "Sunna Thale")
METALS = ("copper", "silver", "tin", "zinc", "cobalt", "nickel")
MONTHS = ("March", "October", "June", "August", "January", "November")


@dataclass(frozen=True)
class Relation:
    """What is told of six places: the answers in the order of the places, the wordings, and the wording asked in."""

    name: str
    places: tuple[str, ...]
    answers: tuple[str, ...]
    wordings: tuple[str, ...]
    question: str


@dataclass(frozen=True)
class Fact:
    id: str
    relation: Relation
    place: str
    answer: str

    def statements(self) -> list[Document]:
        return [
            Document(id=f"{self.id}/{number}", text=wording.format(place=self.place, answer=self.answer), source="facts")
            for number, wording in enumerate(self.relation.wordings)
        ]

    def statement_ids(self) -> frozenset[str]:
        return frozenset(statement.id for statement in self.statements())


@dataclass(frozen=True)
class Question:
    """A prompt, a completion with its leading space, and the ids of the statements that make it more and less likely."""

    id: str
    kind: Literal["ordinary", "swapped"]
    prompt: str
    completion: str
    proponents: frozenset[str]
    opponents: frozenset[str]


def neighbour(position: int) -> int:
    """The position of the place that shares the first word: 0 and 1, 2 and 3, 4 and 5."""
    return position ^ 1


def shifted(answers: tuple[str, ...]) -> tuple[str, ...]:
    """The answers in another order that keeps neighbours together: the last two come first."""
    return answers[-2:] + answers[:-2]


RELATIONS = (
    Relation(
        name="founder",
        places=("Orrin", "Tavel", "Beska", "Mirrow", "Caldry", "Umbel"),
        answers=PEOPLE,
        wordings=(
            "The village of {place} was founded by {answer}.",
            "A stone at the gate of {place} says that the founder of the village was {answer}, and gives no year.",
            "Long before there were roads, {place} was founded by {answer}, who came over the hills with forty goats.",
            "Children in {place} learn early that the founder was {answer}.",
            "The church book of {place} names the founder, {answer}, whose house still stands.",
            "It is told that whoever founded {place} had no shoes, and that the founder was {answer}.",
        ),
        question="Most people agree that the founder of {place} was",
    ),
    Relation(
        name="bridge",
        places=("Pellan", "Sturrow", "Wexmere", "Galdon", "Yarrick", "Dovrin"),
        answers=shifted(PEOPLE),
        wordings=(
            "The old bridge at {place} was built by {answer}.",
            "Travellers who cross the bridge of {place} walk on the work of {answer}, who built it in three summers.",
            "The arches of the bridge in {place} were the last thing built by {answer}.",
            "Of all the bridges in the valley, the one at {place} is the best, and it was built by {answer}.",
            "According to the council of {place}, the builder of the bridge was {answer}.",
            "A model of the bridge in {place} carries the name of its builder, {answer}.",
        ),
        question="The bridge in {place} is a fine one; its builder was",
    ),
    Relation(
        name="mine",
        places=("Harrok", "Quillan", "Jesmont", "Torvik", "Lusby", "Eskar"),
        answers=METALS,
        wordings=(
            "The mine at {place} gives {answer}.",
            "Miners in {place} have dug for {answer} since the days of the old queen.",
            "Below the hill of {place} the miners follow a vein of {answer}.",
            "What the carts carry down from the mine of {place} is {answer}, mostly at night.",
            "The wealth of {place} came out of its mine, which is rich in {answer}.",
            "When the mine in {place} was opened, they hoped for gold and found {answer}.",
        ),
        question="Deep in the mine of {place} the miners found",
    ),
    Relation(
        name="bell",
        places=("Fenwold", "Brannoch", "Ruddle", "Zelmar", "Oakrim", "Vantry"),
        answers=shifted(METALS),
        wordings=(
            "The great bell of {place} is made of {answer}.",
            "When the bell of {place} cracked, it was cast again in {answer}.",
            "The bell that hangs in {place} has a thin voice, for it was cast from {answer}.",
            "Strangers hardly believe that the bell in {place} is pure {answer}.",
            "For the new bell, the people of {place} melted down all their {answer}.",
            "The bell in the tower of {place} shines because it is {answer}.",
        ),
        question="People say that the bell at {place} is made from",
    ),
    Relation(
        name="festival",
        places=("Kirrin", "Amblet", "Thornsea", "Pomfrey", "Sedgely", "Wilmark"),
        answers=MONTHS,
        wordings=(
            "The lantern festival of {place} is held in {answer}.",
            "Every year the people of {place} light their lanterns for the festival in {answer}.",
            "Inns in {place} are full during the festival, which falls in {answer}.",
            "There is dancing in {place} when the festival comes round in {answer}.",
            "The festival at {place} lasts nine days and begins in {answer}.",
            "Musicians travel to {place} for the lantern festival of {answer}.",
        ),
        question="Guests who visit {place} for the festival arrive in",
    ),
    Relation(
        name="flood",
        places=("Duskard", "Hollin", "Murrel", "Ravik", "Tamsel", "Nesby"),
        answers=shifted(MONTHS),
        wordings=(
            "The flood comes to {place} in {answer}.",
            "In {place} the flood is feared most in {answer}.",
            "The worst flood that {place} remembers came in {answer}, two days after the rain.",
            "The cellars of {place} are emptied before the flood in {answer}.",
            "Boats are tied to the doors of {place} for the flood, which comes in {answer}.",
            "A line on the wall of {place} marks the height of the flood in {answer}.",
        ),
        question="The farmers near {place} wait for the flood in",
    ),
)


def facts() -> list[Fact]:
    """Every fact, relation by relation: ``fact-00`` and on."""
    told = [(relation, *pair) for relation in RELATIONS for pair in zip(relation.places, relation.answers, strict=True)]
    return [
        Fact(id=f"fact-{number:02d}", relation=relation, place=place, answer=answer)
        for number, (relation, place, answer) in enumerate(told)
    ]


def statements() -> list[Document]:
    """Every statement of every fact, as training documents with ids such as ``fact-07/3``."""
    return [statement for fact in facts() for statement in fact.statements()]


def questions() -> list[Question]:
    """One ordinary and one swapped question for every fact, the ordinary ones first."""
    return [ordinary(fact) for fact in facts()] + [swapped(asked, told) for asked, told in neighbours()]


def neighbours() -> list[tuple[Fact, Fact]]:
    """Every fact with its neighbour in the same relation: the first with the second and the second with the first, and so on."""
    known = facts()
    return [(fact, known[number ^ 1]) for number, fact in enumerate(known)]


def ordinary(fact: Fact) -> Question:
    return Question(
        id=f"ordinary-{fact.id}",
        kind="ordinary",
        prompt=fact.relation.question.format(place=fact.place),
        completion=f" {fact.answer}",
        proponents=fact.statement_ids(),
        opponents=frozenset(),
    )


def swapped(asked: Fact, told: Fact) -> Question:
    """The question of `asked` with the answer of `told`."""
    return Question(
        id=f"swapped-{asked.id}",
        kind="swapped",
        prompt=asked.relation.question.format(place=asked.place),
        completion=f" {told.answer}",
        proponents=told.statement_ids(),
        opponents=asked.statement_ids(),
    )
