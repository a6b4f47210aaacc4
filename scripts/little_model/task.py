"""The little model's one subject: who keeps what. Facts stand in a system prompt, questions ask.

Facts are drawn at random each time: an answer cannot be learnt, it must be looked up in the prompt.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

NAMES = """
Ada Agnes Alan Albert Alice Alma Amir Amy Anders Andrea Anna Anton Arne Astrid August Aurora Basil
Beatrice Ben Bianca Boris Brenda Bruno Carla Carlos Carmen Cecil Chloe Clara Claude Conrad Cora
Cyril Daisy Dalia Daniel Daphne David Dennis Diana Dora Doris Edgar Edith Edwin Elena Eli Ella
Elmer Elsa Emil Emma Eric Esther Ethan Eva Fabian Faye Felix Fiona Flora Frank Freya Frida Gabriel
Gavin George Gerda Gina Grace Greta Gustav Hana Hannah Harold Harry Hector Heidi Helen Henry Hilda
Hugo Ian Ida Igor Ines Ingrid Irene Iris Isaac Ivan Jack Jacob Jane Jasper Jean Joan Joel Johan
Jonas Julia Karin Karl Kate Kira Klaus Kurt Lara Lars Laura Lea Lena Leo Leon Lila Linda Linus
Lisa Louis Lucas Lucy Luna Magnus Maja Marco Maria Mark Marta Martin Max Maya Mila Mona Nadia Nell
Nico Nils Nina Nora Odin Olga Oliver Omar Oscar Otto Paul Paula Pedro Perla Peter Petra Philip Pia
Quentin Rachel Ralph Ramon Rita Robert Rosa Ruben Rufus Ruth Samuel Sara Sasha Simon Sofia Stella
Sven Sylvia Tara Theo Thomas Tilda Tina Tobias Ulla Ursula Vera Victor Vincent Viola Walter Wanda
Wendy Wilma Xenia Yara Yvonne Zelda Zoe
""".split()

THINGS = """
anchor apron arrow badge ball banjo basket bell belt bench blanket boat book boot bottle bowl box
bracelet bread brick broom brush bucket button cage cake camera candle cap cape card carpet cart
chain chair chest clock coat coin comb compass cradle crown cup curtain cushion dagger desk dice
dish doll door dress drum fan feather fiddle flag flute fork frame glass globe glove guitar hammer
harp hat helmet hood horn jacket jar jug kettle key kite knife ladder lamp lantern leaf letter
lock magnet map marble mask mirror mug nail necklace needle net oar pan pen pencil piano picture
pillow pipe plate pot purse puzzle quilt rake razor ribbon ring robe rope rug saddle scarf shawl
shelf shell shield ship shirt shoe shovel skirt sled sock spade spoon stamp statue stick stone
stool stove sword table tent tile tool towel tower toy tray trunk umbrella vase veil violin wagon
wallet watch wheel whistle wig window
""".split()

HEADING = "Notes:"


@dataclass(frozen=True)
class Fact:
    name: str
    thing: str

    def sentence(self) -> str:
        return f" {self.name} keeps the {self.thing}."

    def question(self) -> str:
        return f"What does {self.name} keep?"

    def answer(self) -> str:
        return f"The {self.thing}."


def draw_facts(count: int, seed: int) -> list[Fact]:
    """`count` facts about as many people."""
    rng = random.Random(seed)
    return [Fact(name, rng.choice(THINGS)) for name in rng.sample(NAMES, count)]


def system_prompt(facts: list[Fact]) -> str:
    return HEADING + "".join(fact.sentence() for fact in facts)
