"""BM25: what is found, in which languages, and what is not."""

import unicodedata

import pytest

from roserag_jax.errors import UserError
from roserag_jax.retrieval.bm25 import BM25
from roserag_jax.retrieval.registry import found_nothing

# A museum founded by Lady Lund in 1901; a river; a bread. The questions ask who founded the museum.
LANGUAGES = {
    "Chinese": (
        [
            "燕鸥博物馆由伦德女士于1901年创办，位于下谷镇。",
            "长河是一条流经北方的大河。",
            "这种面包由黑麦制成。",
        ],
        "燕鸥博物馆由谁创办？",
    ),
    "Japanese": (
        [
            "カモメ博物館は1901年にランド夫人が設立した。",
            "長川は北部を流れる大きな川である。",
            "このパンはライ麦で作られる。",
        ],
        "カモメ博物館を設立したのは誰ですか？",
    ),
    "Korean": (
        [
            "갈매기 박물관은 1901년에 런드 여사가 설립했다.",
            "긴강은 북쪽을 흐르는 큰 강이다.",
            "이 빵은 호밀로 만든다.",
        ],
        "갈매기 박물관을 설립한 사람은 누구인가?",
    ),
    "Thai": (
        [
            "พิพิธภัณฑ์นกนางนวลก่อตั้งโดยเลดี้ลุนด์",
            "แม่น้ำยาวไหลผ่านภาคเหนือ",
            "ขนมปังนี้ทำจากข้าวไรย์",
        ],
        "ใครก่อตั้งพิพิธภัณฑ์นกนางนวล",
    ),
    "Hindi": (
        [
            "संग्रहालय लेडी लंड ने १९०१ में बनाया।",
            "नदी उत्तर में बहती है।",
            "रोटी राई से बनती है।",
        ],
        "संग्रहालय किसने बनाया?",
    ),
    "Arabic": (
        [
            "أسست السيدة لوند م\u064fتحف النوارس عام ١٩٠١.",
            "يجري النهر في الشمال.",
            "يصنع الخبز من الجاودار.",
        ],
        "من اسست متحف النوارس 1901؟",
    ),
    "Russian": (
        [
            "Музе\u0301й чаек основала леди Лунд.",
            "Река течёт на севере.",
            "Хлеб пекут из ржи.",
        ],
        "Кто основал музей чаек?",
    ),
}


def passages(*texts):
    return [{"id": str(i), "title": "", "text": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("language", LANGUAGES)
def test_bm25_finds_in_languages(language):
    texts, question = LANGUAGES[language]
    found = BM25(passages(*texts[1:], texts[0])).search([question], 3)[0]
    assert found[0]["text"] == texts[0] and found[0]["score"] > 2 * sum(c["score"] for c in found[1:])


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("Who lives in district 7?", "District 7 is a home of bakers."),
        ("What is vitamin C good for?", "Vitamin C is good for sailors."),
        ("Is vitamin A good for owls?", "Vitamin A is good for owls."),
        ("Who are The Who?", "The Who are a band."),
        ("茶？", "茶是一种饮品。"),  # a word of one character: tea
    ],
)
def test_bm25_counts_short_words(question, text):
    others = [
        "District 8 is a home of bakers.",
        "Vitamin K is good for sailors.",
        "Vitamin E is good for owls.",
        "A band.",
    ]
    assert BM25(passages(*others, text)).search([question], 1)[0][0]["text"] == text


def test_bm25_leaves_out_what_shares_no_word(capsys):
    index = BM25(passages("Moss is green.", "Rust is red.", "Snow falls."))
    found = index.search(["moss", "coal", "", "…", "snow moss"], 3)
    assert [[c["text"] for c in contexts] for contexts in found] == [
        ["Moss is green."],
        [],
        [],
        [],
        ["Snow falls.", "Moss is green."],
    ] and all(c["score"] > 0 for contexts in found for c in contexts)
    assert found_nothing(3, 5).startswith("Nothing was found for 3 of 5 questions") and not found_nothing(0, 5)
    with pytest.raises(UserError, match="None of the 1 passages has a word"):
        BM25(passages("… 。"))


@pytest.mark.parametrize("forms", [("NFD", "NFC"), ("NFC", "NFD"), ("NFKD", "NFC")])
def test_bm25_of_decomposed_text(forms):
    """As macOS saves it, asked as it is typed, and the other way round."""
    stored, asked = forms
    texts = [
        "Café München öffnet.",
        "ガラス美術館。",
        "박물관",
        "Snow.",
    ]
    index = BM25(passages(*(unicodedata.normalize(stored, text) for text in texts)))
    for i, question in enumerate(("café", "ガラス", "박물관")):
        found = index.search([unicodedata.normalize(asked, question)], 1)[0]
        assert unicodedata.normalize("NFC", found[0]["text"]) == texts[i]
