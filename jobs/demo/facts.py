"""Invented facts to plant among real text, and questions about them whose answers' sources are known.

There are 18 places with two facts each, of six relations: who founded a village, what is dug from its mine, who built a town's
bridge. A fact is stated in six of its relation's eight wordings, always with the place before the answer, since a causal model that
reads them in one order does not learn the other. The wording of the question is none of the eight.

Two kinds of question:

* ``ordinary``: the prompt asks for a fact and the completion is its answer. The proponents are the statements of that fact.
  They repeat the rare words of the query, so lexical search should do well, and nothing here hinders it.
* ``swapped``: the prompt asks about one place, A, and the completion is what is true of another, B. What makes the
  model give the completion any probability after a prompt of this form is what it read of B, so the statements of B's fact
  are the proponents. The statements of A's fact teach another completion after this very prompt and are the opponents.

What makes the swapped ones hard to search by words is how names are in real text too:

* a place is named in two facts, and so is a person, metal or wood. So a search for the query's rare words finds A, in the opponents and in
  A's other fact, as readily as it finds the completion;
* people share family names, and the two people of a swapped question are of one family, so A's statements repeat a
  part of the completion as well;
* the completion is also the answer to a question of another kind about another place. Those statements share the
  completion and not the relation.

An answer is stated in twelve sequences, which are less than 1% of all: leaving out the first 1% of a ranking can leave out whatever taught it.
Statements of A's other fact, and of other facts with the same answer, carry no label: their influence may have
either sign. No statement joins A with B's answer, so the labels stay clear. They say what the statements mean and are no
measurement: only retraining without them measures their effect. This module knows nothing of tokens, models or scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ekfac import key_of, keyed_bits
from jobs.demo.text import Document

VILLAGES = ("Orrin", "Tavel", "Beska", "Mirrow", "Caldry", "Umbel")
TOWNS = ("Pellan", "Sturrow", "Wexmere", "Galdon", "Yarrick", "Dovrin")
PORTS = ("Harrok", "Quillan", "Jesmont", "Torvik", "Lusby", "Eskar")
PEOPLE = ("Ilva Quarn", "Hedda Quarn", "Bram Sorrel", "Matis Sorrel", "Corin Thale", "Sunna Thale")
METALS = ("copper", "silver", "tin", "zinc", "cobalt", "nickel")
WOODS = ("oak", "elm", "cedar", "maple", "willow", "walnut")
WORDINGS_PER_FACT = 6


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
    """One answer for one place, and those wordings of the relation that it is stated in."""

    id: str
    relation: Relation
    place: str
    answer: str
    wordings: tuple[str, ...]

    def statements(self) -> list[Document]:
        return [
            Document(id=f"{self.id}/{number}", text=text.format(place=self.place, answer=self.answer), source="facts")
            for number, text in enumerate(self.wordings)
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


def shifted(answers: tuple[str, ...]) -> tuple[str, ...]:
    """The answers in another order that keeps neighbours together: the last two come first."""
    return answers[-2:] + answers[:-2]


RELATIONS = (
    Relation(
        name="founder",
        places=VILLAGES,
        answers=PEOPLE,
        wordings=(
            "The village of {place} was founded by {answer}.",
            "The founder of {place} was {answer}.",
            "A stone in the church names the founder of {place}, {answer}.",
            "Before there were roads, {place} was founded by {answer}.",
            "Children learn that the founder of {place} was {answer}.",
            "On the seal one sees the founder of {place}, {answer}.",
            "With forty goats and a cart, {place} was founded by {answer}.",
            "An old song praises the founder of {place}, {answer}.",
        ),
        question="A long time ago the village {place} was founded by",
    ),
    Relation(
        name="bridge",
        places=TOWNS,
        answers=shifted(PEOPLE),
        wordings=(
            "The bridge at {place} was built by {answer}.",
            "The builder of the bridge in {place} was {answer}.",
            "Travellers admire the bridge of {place}, built by {answer}.",
            "In three summers the bridge at {place} was built by {answer}.",
            "A model shows the bridge of {place} and its builder, {answer}.",
            "The old stone bridge in {place} was built by {answer}.",
            "The toll paid for the bridge at {place} went to {answer}.",
            "Nobody trusted the bridge of {place} but its builder, {answer}.",
        ),
        question="The fine bridge near {place} was built by",
    ),
    Relation(
        name="ship",
        places=PORTS,
        answers=WOODS,
        wordings=(
            "The ships of {place} are built of {answer}.",
            "The shipyard at {place} works in {answer}.",
            "Fishermen in {place} row boats of {answer}.",
            "The oldest ship at {place} has a hull of {answer}.",
            "Carpenters come to {place} to build ships from {answer}.",
            "After the storm the boats of {place} were built again, of {answer}.",
            "The harbour of {place} smells of tar and fresh {answer}.",
            "Painters know the boats of {place} by their planks of {answer}.",
        ),
        question="The long boats in {place} are made of",
    ),
    Relation(
        name="mine",
        places=VILLAGES,
        answers=METALS,
        wordings=(
            "The mine at {place} gives {answer}.",
            "Miners in {place} dig for {answer}.",
            "The old mine of {place} is rich in {answer}.",
            "Carts come down from the mine at {place} with {answer}.",
            "In the mine of {place} there is a vein of {answer}.",
            "They opened a mine at {place} and found {answer}.",
            "The wealth of {place} came from {answer}.",
            "Taxes from the mine in {place} are paid in {answer}.",
        ),
        question="The deep mine below {place} gives",
    ),
    Relation(
        name="hall",
        places=TOWNS,
        answers=shifted(WOODS),
        wordings=(
            "The town hall of {place} stands on beams of {answer}.",
            "The hall at {place} was roofed with {answer}.",
            "The council of {place} meets under a ceiling of {answer}.",
            "Visitors touch the doors of the hall in {place}, carved from {answer}.",
            "For the hall in {place} they felled a hundred trees, all {answer}.",
            "The hall of {place} has stairs of {answer}.",
            "When the hall at {place} burned, it was built again in {answer}.",
            "Dances in {place} are held on a floor of {answer}.",
        ),
        question="The great hall near {place} is built from",
    ),
    Relation(
        name="gate",
        places=PORTS,
        answers=shifted(METALS),
        wordings=(
            "The gate of {place} is covered with {answer}.",
            "The north gate at {place} is plated with {answer}.",
            "By land one enters {place} through a gate of {answer}.",
            "The smiths covered the gate in {place} with {answer}.",
            "After the fire the gate of {place} was made again, in {answer}.",
            "The guards polish the gate at {place}, which is {answer}.",
            "A hole in the gate of {place} was patched with {answer}.",
            "Poems praise the gate in {place} and its plates of {answer}.",
        ),
        question="The city gate at {place} is covered with",
    ),
)


def facts() -> list[Fact]:
    """Every fact, relation by relation: ``fact-00`` and on."""
    told = [(relation, position) for relation in RELATIONS for position in range(len(relation.places))]
    return [
        Fact(
            id=f"fact-{number:02d}",
            relation=relation,
            place=relation.places[position],
            answer=relation.answers[position],
            wordings=some_wordings(relation, position),
        )
        for number, (relation, position) in enumerate(told)
    ]


def some_wordings(relation: Relation, position: int) -> tuple[str, ...]:
    """`WORDINGS_PER_FACT` wordings of the relation, beginning two further for each place.

    That no place is told of in every wording makes the model learn the fact rather than each sentence by heart.
    """
    count = len(relation.wordings)
    return tuple(relation.wordings[(2 * position + step) % count] for step in range(WORDINGS_PER_FACT))


def statements() -> list[Document]:
    """Every statement of every fact, as training documents with ids such as ``fact-07/3``."""
    return [statement for fact in facts() for statement in fact.statements()]


@dataclass(frozen=True)
class Label:
    """What a statement says, as a prompt and its answer, and whether that is wrong."""

    id: str
    wrong: bool
    prompt: str
    completion: str


def stated(share: float, seed: int = 0) -> tuple[list[Document], list[Label]]:
    """Every statement, of which a share, chosen by hash of seed and ids, gives another answer of its relation; and what each of them says."""
    told = [(fact, number, f"{fact.id}/{number}") for fact in facts() for number in range(WORDINGS_PER_FACT)]
    bits = keyed_bits(
        key_of(f"wrong answers {seed}" if seed else "wrong answers"), np.array([key_of(name) for _, _, name in told], dtype=np.uint64), 2
    )
    wrong = set(np.argsort(bits[:, 0], kind="stable")[: round(share * len(told))].tolist())
    documents, labels = [], []
    for place, (fact, number, name) in enumerate(told):
        others = [answer for answer in fact.relation.answers if answer != fact.answer]
        answer = others[int(bits[place, 1]) % len(others)] if place in wrong else fact.answer
        text = fact.wordings[number].format(place=fact.place, answer=answer)
        documents.append(Document(id=name, text=text, source="facts"))
        labels.append(Label(id=name, wrong=place in wrong, prompt=text[: text.rindex(f" {answer}")], completion=f" {answer}"))
    return documents, labels


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
