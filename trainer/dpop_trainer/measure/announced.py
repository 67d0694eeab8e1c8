"""How a solution says that now comes its final answer, in the languages of many translations of GSM8K and their kin."""

PHRASES = "|".join(
    (
        r"\bthe (?:final )?answer is",
        r"\bdie (?:finale )?antwort (?:ist|lautet)",
        r"\b(?:la|a) (?:respuesta|réponse|risposta|resposta)(?: finale?)? (?:es|est|è|é)",
        r"\bответ(?: —| –| -|:)",
        "答案(?:是|为|為)",
        "答えは",
        "(?:정답은|답은)",
        "(?:الإجابة|الجواب|الاجابة)(?: النهائية| النهائي)? (?:هي|هو)",
        "התשובה(?: הסופית)? היא",
        "उत्तर(?: है|:)",
        "উত্তর হল",
        "คำตอบ(?:สุดท้าย)?คือ",
        "đáp án là",
        r"\bjibu ni",
    )
)
"""A regular expression, to be matched without regard to case."""
