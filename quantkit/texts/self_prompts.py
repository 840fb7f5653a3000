"""Seed prompts with which a model samples its own text: short, of six kinds, in 18 languages.

An opening is raw text that the model continues; a message is a user's turn, which the model's chat
template renders. All prompts were written for quantkit, and none is a prompt of a benchmark. A
change of any prompt, or of their order, needs a new PROMPTS_VERSION, which is part of the key of
cached text.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

Form = Literal["opening", "message"]

ENGLISH = "en"
PROMPTS_VERSION = 1
SELF_KINDS = ("prose", "web", "chat", "math", "code", "reasoning")
"""The kinds in the order in which requests take turns."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeedPrompt:
    """A prompt with the kind and the language of the text that it starts.

    text: empty for text that starts with the first token of a document.
    """

    kind: str
    language: str
    form: Form
    text: str


Row = tuple[str, str]
"""Language and text of a prompt."""

_OPENINGS: Mapping[str, tuple[Row, ...]] = {
    "prose": (
        ("en", "The history of the canal begins in"),
        ("de", "Die Geschichte der Stadt begann"),
        ("zh", "这座城市的历史可以追溯到"),
        ("en", "It was raining when Clara closed the bookshop and"),
        ("fr", "Au début du siècle dernier, les habitants de la vallée"),
        ("ru", "Осенью, когда первые листья упали на дорогу,"),
        ("es", "El río nace en las montañas y"),
        ("ja", "その町の歴史は古く、"),
        ("ar", "تقع المدينة القديمة على ضفاف"),
        ("hi", "यह नदी पहाड़ों से निकलकर"),
        ("pl", "Zamek został zbudowany w"),
        ("tr", "Eski limanın yanındaki küçük evde"),
    ),
    "web": (
        ("en", ""),
        ("en", "# Ten things to do before you paint a wooden fence\n\n"),
        ("de", "Rezept: Kartoffelsuppe für vier Personen\n\nZutaten:\n"),
        ("zh", "本站公告："),
        ("en", "Posted by Marta on Thursday:\n\nWe finally moved into the new house, and"),
        ("es", "Preguntas frecuentes sobre el envío\n\n1."),
        ("pt", "Notícias da região: a câmara municipal anunciou"),
        ("it", "Recensione del ristorante: siamo arrivati alle otto e"),
        ("ko", "여행 후기: 지난주에 부산에 다녀왔는데"),
        ("nl", "Welkom op de website van onze vereniging."),
        ("id", "Tips merawat tanaman di dalam rumah:\n\n1."),
        ("uk", "Новини громади: цього тижня"),
    ),
    "chat": (
        ("en", "User: Hi, my laptop fan is very loud. What can I do?\nAssistant:"),
        ("de", "Nutzer: Wie lange hält sich gekochter Reis im Kühlschrank?\nAssistent:"),
        ("zh", "用户：周末去杭州玩，有什么推荐吗？\n助手："),
        ("en", "Customer: The parcel arrived damaged.\nAgent:"),
        ("fr", "Utilisateur : Comment enlever une tache de café ?\nAssistant :"),
    ),
    "math": (
        ("en", "Question: A baker fills 7 trays with 18 rolls each and sells 95."
               " How many are left?\nAnswer:"),
        ("en", "Theorem. The sum of two odd integers is even.\n\nProof."),
        ("de", "Aufgabe: Ein Zug fährt 3 Stunden mit 84 km/h. Wie weit kommt er?\nLösung:"),
        ("zh", "题目：一个长方形长12厘米，宽5厘米，求周长和面积。\n解："),
        ("en", "To solve the equation 3x + 11 = 50, we"),
        ("fr", "Exercice. Calculer la dérivée de f(x) = x^3 - 4x.\nCorrigé :"),
        ("ru", "Задача. В саду 9 рядов по 14 яблонь. Сколько всего деревьев?\nРешение:"),
    ),
    "code": (
        ("en", "def "),
        ("en", "#include <stdio.h>\n\n"),
        ("en", "import json\nimport sys\nfrom pathlib import Path\n\n\nclass "),
        ("en", "function debounce("),
        ("en", "SELECT customer_id, SUM(amount)\nFROM"),
        ("en", "package main\n\nimport (\n\t\"fmt\"\n"),
        ("en", "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n"),
        ("en", "#!/bin/bash\nset -euo pipefail\n\n"),
        ("en", "use std::collections::HashMap;\n\n"),
        ("en", "public class Inventory {\n"),
    ),
    "reasoning": (
        ("en", "Let us think step by step. Three boxes are labelled wrongly, and"),
        ("en", "Problem: Anna is taller than Ben, and Ben is taller than Carl. Who is shortest?\n"
               "Reasoning:"),
        ("de", "Wir überlegen Schritt für Schritt, warum der Mond Phasen zeigt. Zuerst"),
        ("zh", "让我们一步一步地思考：如果明天下雨，那么"),
        ("es", "Razonemos paso a paso: si todos los gatos duermen de día,"),
    ),
}  # fmt: skip

_MESSAGES: Mapping[str, tuple[Row, ...]] = {
    "prose": (
        ("en", "Write a short story about a lighthouse keeper who finds a letter."),
        ("zh", "请写一篇关于春天的短文。"),
        ("fr", "Décris un marché un samedi matin, en deux paragraphes."),
        ("de", "Erzähle eine kurze Geschichte über einen alten Uhrmacher."),
        ("ja", "秋の山について短い文章を書いてください。"),
        ("en", "Summarize how glaciers shape valleys."),
    ),
    "web": (
        ("en", "Write a product page for a folding bicycle."),
        ("es", "Escribe una entrada de blog sobre cómo cuidar un huerto pequeño."),
        ("de", "Schreibe eine Zimmeranzeige für eine Wohngemeinschaft."),
        ("vi", "Viết một bài giới thiệu ngắn về món phở."),
        ("en", "Draft a newsletter for a neighbourhood library."),
    ),
    "chat": (
        ("en", "Hello! Can you help me plan dinner for six people?"),
        ("zh", "你好，怎样才能坚持早起？"),
        ("de", "Hallo, ich lerne Gitarre. Wie soll ich üben?"),
        ("en", "What is the difference between a virus and a bacterium?"),
        ("fr", "Peux-tu m'expliquer ce qu'est l'inflation ?"),
        ("es", "¿Qué debo llevar a una caminata de tres días?"),
        ("ru", "Посоветуй, как подготовиться к собеседованию."),
        ("ja", "カレーを美味しく作るコツは？"),
        ("ar", "ما هي فوائد القراءة اليومية؟"),
        ("pt", "Como posso economizar energia em casa?"),
        ("ko", "면접 준비는 어떻게 하면 좋을까요?"),
        ("hi", "मुझे अच्छी नींद के लिए कुछ सुझाव दो।"),
        ("en", "Rewrite this politely: send me the report now."),
        ("it", "Quali sono i luoghi da visitare a Bologna?"),
        ("tr", "Evde ekmek nasıl yapılır?"),
        ("pl", "Jak założyć mały ogródek ziołowy?"),
    ),
    "math": (
        ("en", "A tank holds 240 liters and drains 15 liters per minute. When is it half empty?"),
        ("zh", "小明有36张卡片，送出三分之一，还剩多少张？"),
        ("en", "Find the roots of x^2 - 7x + 10 and explain each step."),
        ("de", "Wie groß ist die Wahrscheinlichkeit, mit zwei Würfeln eine Sieben zu werfen?"),
        ("es", "Una camisa cuesta 40 euros y tiene un descuento del 15 %. ¿Cuánto se paga?"),
        ("en", "Prove that the product of three consecutive integers is divisible by 6."),
    ),
    "code": (
        ("en", "Write a Python class for a least recently used cache, with tests."),
        ("en", "How do I undo my last commit in git?"),
        ("zh", "用Python写一个读取CSV文件并画图的脚本。"),
        ("en", "Explain what a deadlock is, with an example in Go."),
        ("de", "Schreibe eine SQL-Abfrage, die doppelte Einträge einer Tabelle zeigt."),
        ("en", "Write a regular expression for dates such as 2024-03-09, and explain it."),
    ),
    "reasoning": (
        ("en", "I have two ropes that each burn for an hour, unevenly. How do I time 45 minutes?"),
        ("zh", "三个人中只有一个人说真话，请推理谁拿了苹果：甲说是乙，乙说不是我，丙说不是我。"),
        ("en", "Is it better to repair or to replace an old washing machine? Weigh it up."),
        ("fr", "Un escargot monte 3 m par jour et glisse de 2 m par nuit. Quand atteint-il 10 m ?"),
        ("de", "Warum ist der Himmel blau und abends rot? Begründe Schritt für Schritt."),
        ("en", "Check this argument: all birds fly, penguins are birds, so penguins fly."),
    ),
}  # fmt: skip


SELF_LANGUAGES = tuple(
    sorted({
        language
        for table in (_OPENINGS, _MESSAGES)
        for rows in table.values()
        for language, _ in rows
    })
)
"""The languages of the prompts."""


def make_label(kind: str, language: str) -> str:
    """Return the label of a kind of text in a language; English is not named."""
    return kind if language == ENGLISH else f"{kind}-{language}"


def list_labels(kinds: Collection[str], languages: Collection[str]) -> tuple[str, ...]:
    """Return the labels of all prompts of these kinds and languages."""
    prompts = list_prompts(kinds, languages, has_openings=True, has_messages=True)
    labels = (make_label(row.kind, row.language) for rows in prompts.values() for row in rows)
    return tuple(dict.fromkeys(labels))


def list_prompts(
    kinds: Collection[str],
    languages: Collection[str],
    *,
    has_openings: bool,
    has_messages: bool,
) -> dict[str, tuple[SeedPrompt, ...]]:
    """Return the prompts of each of these kinds in these languages; openings and messages
    alternate.

    has_openings, has_messages: which forms the model can answer.
    """
    prompts = dict[str, tuple[SeedPrompt, ...]]()
    for kind in SELF_KINDS:
        if kind not in kinds:
            continue
        openings = _make_prompts(kind, "opening", _OPENINGS[kind]) if has_openings else []
        messages = _make_prompts(kind, "message", _MESSAGES[kind]) if has_messages else []
        rows = _alternate(openings, messages)
        prompts[kind] = tuple(prompt for prompt in rows if prompt.language in languages)
    return prompts


def _make_prompts(kind: str, form: Form, rows: tuple[Row, ...]) -> list[SeedPrompt]:
    return [SeedPrompt(kind=kind, language=row[0], form=form, text=row[1]) for row in rows]


def _alternate(first: list[SeedPrompt], second: list[SeedPrompt]) -> list[SeedPrompt]:
    """Merge two lists so that any prefix has about the same share of each."""
    keyed = [
        ((index + 0.5) / len(prompts), place, prompt)
        for place, prompts in enumerate((first, second))
        for index, prompt in enumerate(prompts)
    ]
    return [prompt for _, _, prompt in sorted(keyed, key=lambda entry: entry[:2])]
