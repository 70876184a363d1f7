"""A noisy-retrieval benchmark that no model has seen: fictional people, towns, works and institutions.

    python -m roserag_jax.rag.synthetic --rows 200 --split eval --passages 8 --counterfactual 0.5 --output eval.jsonl
    python -m roserag_jax.rag.synthetic --rows 200 --documents world/    # its encyclopedia, a file an entry

Every row has a question (one- or two-hop, comparison, yes/no), its gold passages, distractors that share an entity
with them, and, on request, a counterfactual passage: an unproven claim that names a wrong answer. The splits draw their
names from disjoint pools, so train and eval share no entity whatever their seeds and sizes.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import zlib
from collections.abc import Iterator

TYPES = ("one_hop", "two_hop", "comparison", "yes_no")
SPLITS = ("train", "eval")

# Names are made of English pieces, so that they cost a language model few tokens and none of its knowledge helps.
_FIRST = (
    "Ada Alma Anton Basil Bruno Carla Clara Conrad Cora Dora Edgar Edith Elena Emil Esther Felix Flora Frida "
    "Greta Gustav Hanna Hector Hugo Ida Igor Irma Ivan Jonas Karl Lena Leo Lydia Magda Marco Marta Max Mina Nora "
    "Oscar Otto Paula Peter Petra Rita Robin Rosa Ruben Selma Simon Sofia Stella Tessa Theo Thomas Tilda Vera "
    "Victor Walter Wanda"
).split()
_HEADS = (
    "Ash Amber Black Bright Brook Cold Copper Crow Dark Deep East Elm Fair Fern Fox Frost Glass Gold Grand Green "
    "Grey Hart Hawk Hazel High Iron King Lake Lamb Lark Light Long Marsh Mill Moon Moss North Oak Old Owl Pine "
    "Plum Raven Red Reed Rose Salt Sand Silver South Star Stone Storm Strong Summer Sun Swan Thorn West White "
    "Wild Wind Winter Wolf"
).split()
_TAILS = (
    "bank born bridge brook burn bury cliff dale field ford gate grove ham haven hill hold land mark mere port"
).split()
_PEOPLE = (
    "berg bright craft down fellow hart heart house lake lane low man smith son stone ward water way well wood"
).split()
_JOBS = "botanist glassblower cartographer violinist surgeon mason chemist falconer printer stargazer".split()
_GENRES = "novel comedy play symphony poem history".split()
_KINDS = ("Academy", "Institute", "Museum", "Library", "Observatory", "Conservatory")
_ADJECTIVES = "Silent Crooked Amber Hollow Distant Burning Patient Velvet Northern Forgotten".split()
_NOUNS = "Lantern Harvest Bridge Orchard Mirror Winter Compass Garden Voyage Clock".split()
_CLAIMS = (
    "A gossip column once claimed, without any proof, that",
    "An anonymous pamphlet wrongly stated that",
    "According to a rumour that was never confirmed,",
)


# There are names for few more in a split; a larger world has more works alone.
_MOST_REGIONS, _MOST_TOWNS, _MOST_INSTITUTIONS, _MOST_PEOPLE = 1000, 4000, 20_000, 30_000


@dataclasses.dataclass(eq=False)
class _Entity:
    """A name, its attributes, and the passage that states them."""

    name: str
    kind: str
    facts: dict


def _names(entity: _Entity) -> set[str]:
    """The proper names in an entity's entry."""
    values = {v.name if isinstance(v, _Entity) else v for v in entity.facts.values()}
    return {entity.name} | {v for v in values if isinstance(v, str) and v not in _JOBS + _GENRES}


class _World:
    """Entities of one split that refer to one another, and indices over who shares what."""

    def __init__(self, rng: random.Random, split: str, size: int):
        self.rng, self.split, self.taken = rng, split, set()
        compass = ("Upper", "Lower", "Inner", "Outer")
        region = lambda: self._name(lambda: f"{rng.choice(compass)} {self._word(_TAILS)}")
        regions = [region() for _ in range(min(size // 8 + 3, _MOST_REGIONS))]
        self.towns, self.people, self.institutions, self.works = [], [], [], []
        for _ in range(min(size // 2 + 6, _MOST_TOWNS)):
            facts = {"region": rng.choice(regions), "inhabitants": rng.randrange(1200, 98000, 100)}
            facts["river"] = rng.choice(_HEADS) + " Water"
            self.towns.append(_Entity(self._name(self._place), "town", facts))
        for _ in range(min(size // 2 + 6, _MOST_INSTITUTIONS)):
            facts = {"town": rng.choice(self.towns), "year": rng.randrange(1640, 1930), "founder": None}
            name = self._name(lambda: f"{self._place()} {rng.choice(_KINDS)}")
            self.institutions.append(_Entity(name, "institution", facts))
        for _ in range(min(size + 8, _MOST_PEOPLE)):
            facts = {"birthplace": rng.choice(self.towns), "year": rng.randrange(1700, 1960), "job": rng.choice(_JOBS)}
            facts["institution"] = rng.choice(self.institutions)
            self.people.append(
                _Entity(self._name(lambda: f"{rng.choice(_FIRST)} {self._word(_PEOPLE)}"), "person", facts)
            )
        for institution in self.institutions:
            institution.facts["founder"] = rng.choice(self.people)
        for _ in range(size + 8):
            facts = {"author": rng.choice(self.people), "year": rng.randrange(1725, 2000), "genre": rng.choice(_GENRES)}
            title = lambda: f"The {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} of {self._place()}"
            self.works.append(_Entity(self._name(title), "work", facts))
        self.all = self.towns + self.institutions + self.people + self.works
        self.naming = collections.defaultdict(list)  # a name, and the entities whose entry names it
        for entity in self.all:
            for name in _names(entity):
                self.naming[name].append(entity)

    def _word(self, tails: list[str]) -> str:
        return self.rng.choice(_HEADS) + self.rng.choice(tails)

    def _place(self) -> str:
        """A town's name; big worlds need more than one word."""
        first = self.rng.choice(("", "", "New ", "Great ", "Little ", "Market ", "Castle ", "Port "))
        return first + self._word(_TAILS)

    def _name(self, make) -> str:
        """A name not used yet, from this split's half of all names."""
        while True:
            name = make()
            if name not in self.taken and SPLITS[zlib.crc32(name.encode()) % 2] == self.split:
                self.taken.add(name)
                return name

    def passage(self, entity: _Entity, is_supporting: bool = False) -> dict:
        """The encyclopedia entry of an entity."""
        f, name = entity.facts, entity.name
        text = {
            "town": lambda: (
                f"{name} is a town in {f['region']} with {f['inhabitants']} inhabitants. "
                f"It lies on the river {f['river']}."
            ),
            "institution": lambda: (
                f"The {name} stands in {f['town'].name}. It was founded in {f['year']} by {f['founder'].name}."
            ),
            "person": lambda: (
                f"{name} was a {f['job']}, born in {f['birthplace'].name} in {f['year']}, "
                f"who worked at the {f['institution'].name}."
            ),
            "work": lambda: f"{name} is a {f['genre']} by {f['author'].name}. It first appeared in {f['year']}.",
        }[entity.kind]()
        return {"title": name, "text": text, "is_supporting": is_supporting}

    def related(self, gold: list[_Entity]) -> list[_Entity]:
        """Entities whose entry names something that a gold entry names too, and that are not gold."""
        near = {e.name: e for g in gold for name in sorted(_names(g)) for e in self.naming[name] if e not in gold}
        return list(near.values())

    def other(self, entities: list[_Entity], than: _Entity) -> _Entity:
        """Another entity of the same list."""
        while True:
            entity = self.rng.choice(entities)
            if entity is not than:
                return entity


# A question maker returns (question, answer, gold entities, wrong answer, the claim that states the wrong answer).


def _one_hop(w: _World):
    pick = w.rng.choice
    kind = pick(("birthplace", "author", "founded", "region"))
    if kind == "birthplace":
        p = pick(w.people)
        wrong = w.other(w.towns, p.facts["birthplace"]).name
        claim = f"{p.name} was born in {wrong}"
        return f"In which town was {p.name} born?", p.facts["birthplace"].name, [p], wrong, claim
    if kind == "author":
        b = pick(w.works)
        wrong = w.other(w.people, b.facts["author"]).name
        return f"Who is the author of {b.name}?", b.facts["author"].name, [b], wrong, f"{b.name} is by {wrong}"
    if kind == "founded":
        i = pick(w.institutions)
        wrong = str(i.facts["year"] + pick((-40, -17, -6, 9, 23, 38)))
        claim = f"the {i.name} was founded in {wrong}"
        return f"In what year was the {i.name} founded?", str(i.facts["year"]), [i], wrong, claim
    t = pick(w.towns)
    wrong = pick([o.facts["region"] for o in w.towns if o.facts["region"] != t.facts["region"]])
    return f"In which region is the town of {t.name}?", t.facts["region"], [t], wrong, f"{t.name} is a town in {wrong}"


def _two_hop(w: _World):
    pick = w.rng.choice
    kind = pick(("author_birthplace", "birth_region", "workplace_founder", "workplace_town"))
    if kind == "author_birthplace":
        b = pick(w.works)
        a = b.facts["author"]
        wrong = w.other(w.towns, a.facts["birthplace"]).name
        claim = f"{a.name} was born in {wrong}"
        return f"In which town was the author of {b.name} born?", a.facts["birthplace"].name, [b, a], wrong, claim
    p = pick(w.people)
    if kind == "birth_region":
        t = p.facts["birthplace"]
        wrong = pick([o.facts["region"] for o in w.towns if o.facts["region"] != t.facts["region"]])
        claim = f"{t.name} is a town in {wrong}"
        return f"In which region is the town where {p.name} was born?", t.facts["region"], [p, t], wrong, claim
    i = p.facts["institution"]
    if kind == "workplace_founder":
        wrong = w.other(w.people, i.facts["founder"]).name
        claim = f"the {i.name} was founded by {wrong}"
        return f"Who founded the institution where {p.name} worked?", i.facts["founder"].name, [p, i], wrong, claim
    wrong = w.other(w.towns, i.facts["town"]).name
    claim = f"the {i.name} stands in {wrong}"
    return f"In which town is the institution where {p.name} worked?", i.facts["town"].name, [p, i], wrong, claim


def _comparison(w: _World):
    kind = w.rng.choice(("founded", "inhabitants", "born"))
    entities, key = {
        "founded": (w.institutions, "year"),
        "inhabitants": (w.towns, "inhabitants"),
        "born": (w.people, "year"),
    }[kind]
    while True:
        a, b = w.rng.sample(entities, 2)
        if a.facts[key] != b.facts[key]:
            break
    low, high = sorted((a, b), key=lambda e: e.facts[key])
    if kind == "founded":
        question = f"Which was founded first, the {a.name} or the {b.name}?"
        return question, low.name, [a, b], high.name, f"the {high.name} was founded long before the {low.name}"
    if kind == "inhabitants":
        question = f"Which town has more inhabitants, {a.name} or {b.name}?"
        return question, high.name, [a, b], low.name, f"{low.name} has more inhabitants than {high.name}"
    question = f"Who was born later, {a.name} or {b.name}?"
    return question, high.name, [a, b], low.name, f"{low.name} was born after {high.name}"


def _yes_no(w: _World):
    yes, pick = w.rng.random() < 0.5, w.rng.choice
    if pick((True, False)):
        b = pick(w.works)
        author = b.facts["author"]
        named = author if yes else w.other(w.people, author)
        claim = f"{b.name} is not by {named.name}" if yes else f"{b.name} is by {named.name}"
        question, gold = f"Is {named.name} the author of {b.name}?", [b]
    else:
        a = pick(w.people)
        same = [p for p in w.people if p is not a and p.facts["birthplace"] is a.facts["birthplace"]]
        yes = yes and bool(same)
        other = [p for p in w.people if p.facts["birthplace"] is not a.facts["birthplace"]]
        b = pick(same if yes else other)
        question, gold = f"Were {a.name} and {b.name} born in the same town?", [a, b]
        claim = f"{a.name} and {b.name} were born in {'different towns' if yes else 'the same town'}"
    return question, "yes" if yes else "no", gold, "no" if yes else "yes", claim


_MAKERS = {"one_hop": _one_hop, "two_hop": _two_hop, "comparison": _comparison, "yes_no": _yes_no}


def generate(
    rows: int,
    split: str,
    seed: int = 0,
    passages: int = 5,
    missing_gold: float = 0.0,
    counterfactual: float = 0.0,
    types: tuple[str, ...] = TYPES,
) -> Iterator[dict]:
    """Yield unified rows `{id, question, golden_answers, contexts: [{title, text, is_supporting}], metadata}`.

    Args:
      rows: how many questions; types take turns.
      split: 'train' or 'eval'; the two share no entity.
      passages: K, passages of a row, in random order; at least 2.
      missing_gold: fraction of rows that lack one gold passage (a distractor takes its place).
      counterfactual: fraction of rows with a passage that states a wrong answer as an unproven claim.
      types: which of `TYPES` to make.

    Raises:
      ValueError: an argument is outside its range.
    """
    if split not in SPLITS or unknown_types(types) or passages < 2 or rows < 0:
        raise ValueError(f"bad arguments: {split=} of {SPLITS}, {types=} of {TYPES}, {passages=} >= 2, {rows=} >= 0")
    if not (0 <= missing_gold <= 1 and 0 <= counterfactual <= 1):
        raise ValueError(f"fractions must lie between 0 and 1: {missing_gold=}, {counterfactual=}")
    rng = random.Random(f"{seed}/{split}")
    world = _World(rng, split, max(rows, 24))
    seen = set()
    for number in range(rows):
        kind = types[number % len(types)]
        question = None
        while question is None or question in seen:
            question, answer, gold, wrong, claim = _MAKERS[kind](world)
        seen.add(question)
        misses, doubted = rng.random() < missing_gold, rng.random() < counterfactual
        missing = rng.choice(gold) if misses else None
        contexts = [world.passage(e, is_supporting=True) for e in gold if e is not missing]
        if doubted and len(contexts) < passages:
            text = f"{rng.choice(_CLAIMS)} {claim}."
            contexts.append({"title": f"{gold[-1].name} (rumours)", "text": text, "is_supporting": False})
        near = world.related(gold)
        rng.shuffle(near)
        far = [e for e in rng.sample(world.all, min(len(world.all), 3 * passages)) if e not in near and e not in gold]
        distractors = (near + far)[: passages - len(contexts)]
        contexts += [world.passage(e) for e in distractors]
        rng.shuffle(contexts)
        yield {
            "id": f"synthetic-{split}-{seed}-{number:05d}",
            "question": question,
            "golden_answers": [answer],
            "contexts": contexts[:passages],
            "metadata": {
                "type": kind,
                "gold": [e.name for e in gold],
                "missing_gold": missing.name if missing else None,
                "counterfactual": wrong if doubted else None,
            },
        }


def documents(rows: int, split: str, seed: int = 0) -> dict[str, str]:
    """The encyclopedia that `generate` asks about with the same arguments: the text of each entry, by its name."""
    world = _World(random.Random(f"{seed}/{split}"), split, max(rows, 24))
    return {entity.name: world.passage(entity)["text"] for entity in world.all}


def unknown_types(types) -> set[str]:
    """Question types that do not exist."""
    return set(types) - set(TYPES)


def main() -> None:
    """Write a data set as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200, help="number of questions")
    parser.add_argument("--split", choices=SPLITS, default="train", help="the two splits share no entity")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other entities and questions")
    parser.add_argument("--passages", type=int, default=5, help="number of passages of a question (K)")
    parser.add_argument("--missing-gold", type=float, default=0.0, help="fraction of rows that lack a gold passage")
    parser.add_argument("--counterfactual", type=float, default=0.0, help="fraction of rows with a wrong claim")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES), help="kinds of questions")
    parser.add_argument("--output", help="the .jsonl file to write")
    parser.add_argument("--documents", help="the folder to write the encyclopedia to, one .txt an entry")
    args = vars(parser.parse_args())
    output, folder = args.pop("output"), args.pop("documents")
    if not (output or folder):
        parser.error("name a file (--output) or a folder (--documents)")
    args["types"] = tuple(args["types"])
    if folder:
        os.makedirs(folder, exist_ok=True)
        entries = documents(args["rows"], args["split"], args["seed"])
        for name, text in entries.items():
            with open(os.path.join(folder, f"{name}.txt"), "w", encoding="utf-8") as file:
                file.write(f"{text}\n")
        print(f"{len(entries)} entries written to {folder}")
    if not output:
        return
    try:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generate(**args)]
    except ValueError as error:
        parser.error(str(error))
    with open(output, "w", encoding="utf-8") as file:
        file.writelines(lines)
    print(f"{len(lines)} questions written to {output}")


if __name__ == "__main__":
    main()
