r"""
CIDEr, BLEU and ROUGE-L: how captions are scored. Equal to coco-caption, in numpy, without Java.

    python cider.py results.json captions_val2017.json             # the table of scores
    python cider.py results.json captions_val2017.json show=5      # and the 5 best and worst
    python cider.py results.json captions_val2017.json out=s.json  # and every image's scores
    python cider.py results.json captions_val2017.json subset=True # results for some images only

results.json is a COCO results file, [{"image_id": 42, "caption": "a dog"}, ...], the other any COCO
captions file. It needs no GPU; 5,000 images with five references each take a second.

CIDEr (Vedantam, Zitnick, Parikh 2015, https://arxiv.org/abs/1411.5726) asks: people described the
picture; does the candidate say what they agree on, in words that carry information? A caption
becomes a vector with one entry for each n-gram g (n words in a row), its tf-idf weight:

    w(g) = how often the caption has g * ln(N / in how many of the N images a reference has g)

"a" is in the references of every image: ln(N / N) = 0, it counts nothing. "unicycle" is in few: it
counts much. The candidate c is compared with each reference r by the cosine of their vectors. The
mean over references and over n = 1..4 is the image's score. What papers print is the variant
CIDEr-D, which is harder to fool:

    CIDEr-D_n(c, r) = 10 * exp(-(|c| - |r|)^2 / (2 * 6^2))
                         * sum_g min(w_c(g), w_r(g)) * w_r(g) / (||w_c|| * ||w_r||)

The min clips: "dog dog dog" gets no more than the reference's one dog. The Gaussian punishes a
wrong length. The scale is 0 to 10; tables print it x100. An image scored alone gets 0: for N = 1
all logarithms are 0. A subset has its own N and frequencies, so its score is not the mean of its
images' scores within the whole set: compare equal splits, or give the frequencies of a corpus
(`df=`), as training on CIDEr does.
"""
import functools
import itertools
import json
import math
import re
import unicodedata
from collections import Counter, defaultdict

import numpy as np

# --------------------------------------------------------------------------------------------------
# settings: `python cider.py name=value` overrides any; rules such as >= 1 are checked

results: str = None         # COCO results file: the candidates
captions: str = None        # COCO captions file: the references
subset = False              # score only the images in results, with document frequencies of those
out: str = None             # write the scores, overall and of each image, to this json file
show = 0                    # >= 0: print this many of the best and of the worst captions

# +------------------------------------------------------------------------------------------------+
# | CIDEr-D in twenty lines, the formula above word for word. It is here to be read, and to check  |
# | the fast version below, which sorts instead of counting and is some fifty times as fast.       |
# +------------------------------------------------------------------------------------------------+


def naive_cider(candidates, references):
    """CIDEr-D of each image (N,). candidates: N lists of words; references: N lists of those."""
    def ngrams_of(words, n):
        return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))

    def length_of(words):  # coco-caption counts the bigrams
        return max(0, len(words) - 1)

    scores = np.zeros(len(candidates))
    for n in 1, 2, 3, 4:
        df = Counter()
        for refs in references:
            df.update(set().union(*(ngrams_of(ref, n) for ref in refs)))

        def tf_idf(words):
            idf = math.log(len(references))
            counts = ngrams_of(words, n)
            return {g: tf * (idf - math.log(max(1, df[g]))) for g, tf in counts.items()}

        for i, (candidate, refs) in enumerate(zip(candidates, references)):
            c = tf_idf(candidate)
            for ref in refs:
                r = tf_idf(ref)
                cosine = sum(min(c[g], r[g]) * r[g] for g in c.keys() & r.keys())
                norms = math.hypot(*c.values()) * math.hypot(*r.values())
                penalty = math.exp(-(length_of(candidate) - length_of(ref)) ** 2 / (2 * 6 ** 2))
                scores[i] += 10 * penalty * (cosine / norms if norms else 0) / 4 / len(refs)
    return scores


# --------------------------------------------------------------------------------------------------
# The fast version. All captions stand end to end in one flat array of word numbers. Letters:
# N images; S sentences (each image's candidate, then its references); T words in all of them;
# n the order, 1..4; G different n-grams; E different (n-gram, sentence) pairs.


def factorize(sentences):
    """Lists of words -> the different words; all words as numbers of those (T,); lengths (S,)."""
    # what is looked up for the first time gets the next number
    numbers = defaultdict(itertools.count().__next__)
    words, lengths = [], []
    for sentence in sentences:
        words.extend(map(numbers.__getitem__, sentence))
        lengths.append(len(sentence))
    return list(numbers), np.array(words, np.int64), np.array(lengths, np.int64)


def grouped(items, counts):
    """A list of the first counts[0] items, a list of the next counts[1], ..."""
    items = iter(items)
    return [list(itertools.islice(items, count)) for count in counts]


def ranges(first, counts):
    """first[0], first[0] + 1, ..., counts[0] of them, then first[1], first[1] + 1, ..."""
    end = np.cumsum(counts)
    return np.arange(counts.sum()) + np.repeat(first - (end - counts), counts)


def expand(ids, lengths, flat, counts):
    """
    Replaces each id of the sentences, ids (T,) and lengths (S,), by its list of others. The lists
    stand end to end in `flat`; counts are their lengths.
    """
    first = np.cumsum(counts) - counts
    ends = np.append(0, np.cumsum(counts[ids]))[np.append(0, np.cumsum(lengths))]
    return flat[ranges(first[ids], counts[ids])], np.diff(ends)


def run_starts(*columns):
    """True where a row of the columns differs from the row above."""
    new = np.arange(len(columns[0])) == 0
    for column in columns:
        new[1:] |= column[1:] != column[:-1]
    return new


def index(candidates, references, tokenized=True):
    """
    Lists of tokens, or captions -> image (S,), the image of each sentence; whole, the words (T,)
    and lengths (S,) for ROUGE-L; split, the same for CIDEr and BLEU, to which "22 3/4", held
    together by a no-break space, is two words; vocabulary, the words that split numbers.
    """
    flat = list(itertools.chain.from_iterable(references))
    words, ids, lengths = factorize([*candidates, *flat]) if tokenized else read(candidates, flat)
    image = np.repeat(np.arange(len(references)), list(map(len, references)))
    image = np.append(np.arange(len(candidates)), image)
    order = np.argsort(image, kind="stable")  # each candidate, then its references
    first = np.cumsum(lengths) - lengths
    ids, lengths = ids[ranges(first[order], lengths[order])], lengths[order]
    vocabulary, *parts = factorize(map(str.split, words))
    return image[order], (ids, lengths), expand(ids, lengths, *parts), vocabulary


def ngrams(words, lengths):
    """
    Counts all n-grams by sorting: equal ones come to stand together. For n = 1..4: gram, sentence,
    tf (E,), first (G,). Row e: n-gram gram[e] is tf[e] times in sentence[e]. Rows are sorted by
    n-gram, then sentence. words[first[g]:][:n] are the words of n-gram g.
    """
    T, V = len(words), int(words.max(initial=0)) + 1
    place = np.arange(T, dtype=np.int32)
    bits = T.bit_length()
    sentence = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)  # (T,)
    # words from here to the end of the sentence
    left = np.repeat(np.cumsum(lengths, dtype=np.int32), lengths) - place  # (T,)
    shorter = np.zeros(T, np.int32)  # (T,) the (n-1)-gram that begins here
    for n in 1, 2, 3, 4:
        if int(shorter.max(initial=0) + 1) * V >= 1 << (63 - bits):
            raise ValueError(f"{T} words are too many: score them in parts, with df=")
        size = max(0, T - n + 1)
        # an n-gram is the (n-1)-gram here and one word more, packed into one integer
        packed = shorter[:size] * np.int64(V) + words[n - 1:]
        # with the place in the low bits, sorting gives the places too: far faster than argsort
        packed = np.sort((packed << bits | place[:size])[left[:size] >= n])
        start = packed & ((1 << bits) - 1)
        new = run_starts(packed >> bits)
        gram = np.cumsum(new, dtype=np.int32) - 1
        shorter[start] = gram
        sentence_of = sentence[start]
        row = np.flatnonzero(new | run_starts(sentence_of))
        yield gram[row], sentence_of[row], np.diff(row, append=len(gram)), start[new]


def spelled(words, first, n, vocabulary):
    """The n-grams that begin at words[first], as tuples of strings."""
    numbers = words[first[:, None] + np.arange(n)]
    return map(tuple, np.array(vocabulary, object)[numbers].tolist())


def document_frequencies(references):
    """
    Lists of token lists, one for each image -> {("a", "dog"): number of images that have it}, with
    N under the key (). N-grams of a single image are left out: what is not in the dict counts as 1.
    """
    image, _, (words, lengths), vocabulary = index([], references)
    df = {(): len(references)}
    for n, (gram, sentence, _, first) in enumerate(ngrams(words, lengths), 1):
        images = np.bincount(gram[run_starts(gram, image[sentence])], minlength=len(first))
        several = images > 1
        df.update(zip(spelled(words, first[several], n, vocabulary), images[several].tolist()))
    return df


def cider(words, lengths, image, vocabulary, df=None):
    """
    CIDEr-D of each image (N,) (paper: eq. 1-3 and section 6), and for BLEU the matches (4, N):
    n-grams of the candidate, each counted at most as often as in the reference that has it most.
    """
    is_candidate = run_starts(image)  # (S,)
    candidate = np.flatnonzero(is_candidate)  # (N,)
    S, N = len(lengths), len(candidate)
    similarity, matches = np.zeros(S), np.zeros((4, N))
    for n, (gram, sentence, tf, first) in enumerate(ngrams(words, lengths), 1):
        of_candidate = is_candidate[sentence]  # (E,)
        # the first row of an n-gram in an image: the candidate's, if the candidate has it
        top = run_starts(gram, image[sentence])  # (E,)
        only_candidate = of_candidate & np.append(top, True)[1:]  # no reference has it
        if df is None:
            images = np.bincount(gram[top & ~only_candidate], minlength=len(first))
        else:
            images = np.array([df.get(g, 0) for g in spelled(words, first, n, vocabulary)])
        # one logarithm of a quotient: exactly 0 for what every image has
        idf = np.log((N if df is None else df[()]) / np.maximum(1, images))  # (G,)
        weight = tf * idf[gram]  # (E,)
        norm = np.sqrt(np.bincount(sentence, weight ** 2, S))  # (S,)

        # pairs of rows with the same n-gram and image: c, a candidate's, and r, a reference's.
        # Reference rows follow the candidate's, up to the next top.
        shared = np.flatnonzero(of_candidate & ~only_candidate)
        tops = np.append(np.flatnonzero(top), len(top))
        counts = tops[np.searchsorted(tops, shared) + 1] - shared - 1
        r, c = ranges(shared + 1, counts), np.repeat(shared, counts)
        dot = np.bincount(sentence[r], np.minimum(weight[c], weight[r]) * weight[r], S)
        norms = norm * norm[candidate][image]
        similarity += np.divide(dot, norms, out=np.zeros(S), where=norms > 0)
        most = np.maximum.reduceat(tf[r], np.cumsum(counts) - counts)
        matches[n - 1] = np.bincount(image[sentence[shared]], np.minimum(tf[shared], most), N)
    bigrams = np.maximum(lengths - 1, 0)
    similarity *= np.exp(-(bigrams[candidate][image] - bigrams) ** 2 / (2 * 6.0 ** 2))
    return 10 * np.bincount(image, similarity, N) / 4 / (np.bincount(image) - 1), matches


def cider_of_tokens(candidates, references, df=None):
    """CIDEr-D of each image (N,). Arguments as in `evaluate`, with tokenized=True."""
    image, _, split, vocabulary = index(candidates, references)
    return cider(*split, image, vocabulary, df)[0]


# --------------------------------------------------------------------------------------------------
# BLEU and ROUGE-L


def bleu(matches, lengths, image):
    """
    BLEU-1..4 of the corpus (4,), which is not the mean of its images', and of each image (4, N)
    (Papineni et al. 2002, section 2.3): the geometric mean of the precisions, matches / n-grams of
    the candidate, times exp(1 - r/c) if its length c is below that of the closest reference, r.
    The tiny numbers are coco-caption's: where no 4-gram matches, BLEU-4 is about 1e-4, not 0.
    """
    candidate = np.flatnonzero(run_starts(image))
    c, longest = lengths[candidate], lengths.max()
    difference = np.abs(lengths - c[image])  # (S,)
    difference[candidate] = longest + 1
    closest = difference == np.minimum.reduceat(difference, candidate)[image]
    # of two references that are equally close, the shorter
    r = np.minimum.reduceat(np.where(closest, lengths, longest), candidate)  # (N,)
    tries = np.maximum(c - np.arange(4)[:, None], 0)  # (4, N)

    def formula(matches, tries, c, r):
        product = np.cumprod((matches + 1e-15) / (tries + 1e-9), 0)
        mean = np.stack([product[n - 1] ** (1 / n) for n in (1, 2, 3, 4)])
        return mean * np.exp(np.minimum(0, 1 - 1 / ((c + 1e-15) / (r + 1e-9))))

    corpus = formula(matches.sum(1), tries.sum(1), c.sum(), r.sum())
    return corpus, formula(matches, tries, c, r)


def lcs(a, b):
    """
    Length of the longest common subsequence of two lists (Hyyrö 2004, "Bit-parallel LCS-length
    computation revisited"). A row of the usual table rises by 0 or 1 from word to word of the
    shorter list; it is kept as one integer with a 0 bit at each rise. One addition, whose carries
    run along the bits, makes the next row.
    """
    short, long = sorted((a, b), key=len)
    places = defaultdict(int)  # bit i of places[word] is 1 if short[i] is the word
    for i, word in enumerate(short):
        places[word] |= 1 << i
    row = all_ones = (1 << len(short)) - 1
    for word in long:
        if word in places:
            match = row & places[word]
            row = ((row + match) | (row - match)) & all_ones
    return len(short) - row.bit_count()


def rouge_l(candidate, references, beta=1.2):
    """
    ROUGE-L of one image (Lin 2004, eq. 2-4): F of precision lcs / |c| and recall lcs / |r|, each
    the best over the references.
    """
    common = [lcs(candidate, ref) for ref in references]
    precision = max(common) / len(candidate)
    recall = max(words / len(ref) for words, ref in zip(common, references))
    f = (1 + beta ** 2) * precision * recall
    return f / max(recall + beta ** 2 * precision, 1e-9)


def evaluate(candidates, references, df=None, tokenized=False):
    """
    N strings and N lists of strings -> scores {metric: float}, per_image {metric: (N,)}; CIDEr runs
    from 0 to 10. df: document_frequencies of another corpus. tokenized: each string is a list of
    tokens already. Raises ValueError with one line.
    """
    kind, what = ((list, tuple), "a list of tokens") if tokenized else (str, "a string")
    if not 0 < len(candidates) == len(references):
        raise ValueError(f"{len(candidates)} candidates, references of {len(references)} images")
    for i, (candidate, refs) in enumerate(zip(candidates, references)):
        if not isinstance(refs, (list, tuple)) or not refs:
            raise ValueError(f"image {i}: references must be a list, not empty: {refs!r:.60}")
        for sentence in (candidate, *refs):
            if not isinstance(sentence, kind):
                raise ValueError(f"image {i}: not {what}: {sentence!r:.60}")
    if df is not None and () not in df:
        raise ValueError("df= lacks df[()], the number of images: use document_frequencies")
    image, whole, (words, lengths), vocabulary = index(candidates, references, tokenized)
    if not lengths[~run_starts(image)].any():
        raise ValueError(f"all references are empty, of image 0 to image {image[-1]}")
    cider_each, matches = cider(words, lengths, image, vocabulary, df)
    bleu_corpus, bleu_each = bleu(matches, lengths, image)
    # coco-caption takes a caption without words for one empty word, here -1
    sentences = [sentence or [-1] for sentence in grouped(whole[0].tolist(), whole[1])]
    per_image = grouped(sentences, np.bincount(image))
    rouge_each = np.array([rouge_l(candidate, refs) for candidate, *refs in per_image])
    names = "CIDEr", "Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L"
    scores = map(float, (cider_each.mean(), *bleu_corpus, rouge_each.mean()))
    return dict(zip(names, scores)), dict(zip(names, (cider_each, *bleu_each, rouge_each)))


# --------------------------------------------------------------------------------------------------
# files


def read_captions(path):
    """
    A COCO captions file -> (images, captions): the entries of its "images", and for each of them
    the list of its captions. Annotations of images that "images" does not list are left out, as in
    coco-caption. Without "images", the annotations say which images there are. Raises ValueError
    unless ids are unique, captions are strings with a word in them, and every image has one.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            content = json.load(file)
        rows = [(str(row["image_id"]), row["caption"]) for row in content["annotations"]]
        images = content.get("images", [dict(id=name) for name in dict(rows)])
        names = [(str(image["id"]), image.get("file_name", "none")) for image in images]
    except KeyError as problem:
        raise ValueError(f"{path} is not a COCO captions file: {problem} is missing in it")
    except (ValueError, TypeError, AttributeError) as problem:
        raise ValueError(f'{path} is not a COCO captions file, which has "images" (id, file_name) '
                         f'and "annotations" (image_id, caption): {problem}')
    captions = {}
    for image, file_name in names:
        if image in captions:
            raise ValueError(f"{path}: two images have the id {image}")
        if not isinstance(file_name, str) or not file_name:
            raise ValueError(f"{path}: the file_name of image {image} is {file_name!r}, not a name")
        captions[image] = []
    for image, caption in rows:
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"{path}: a caption of image {image} is {caption!r}, not text")
        if image in captions:
            captions[image].append(caption)
    silent = [image for image in captions if not captions[image]]
    if silent or not images:
        raise ValueError(f"{path}: {len(silent)} of {len(images)} images have no caption, such as "
                         f"image_id {', '.join(silent[:5])}")
    return images, list(captions.values())


def read_results(path):
    """A COCO results file -> {image id, as a string: its caption}. Raises ValueError, likewise."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            rows = [(str(row["image_id"]), row["caption"]) for row in json.load(file)]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f'{path} is not a COCO results file, a list of {{"image_id": 42, '
                         f'"caption": "a dog"}}: {type(problem).__name__} {problem}')
    results = {}
    for image, caption in rows:
        if image in results:
            raise ValueError(f"{path}: image_id {image} has more than one caption")
        if not isinstance(caption, str):
            raise ValueError(f"{path}: the caption of image_id {image} is {caption!r}, not text")
        results[image] = caption
    return results


# --------------------------------------------------------------------------------------------------
# Captions -> tokens. A text has few different chunks between spaces: each is cut once, unless what
# stands beside it matters.


def read(*texts):
    """The tokens of texts, lists of captions, as `factorize` returns them."""
    captions, ends = list(itertools.chain(*texts)), np.cumsum(list(map(len, texts)))
    chunks, ids, lengths = factorize(map(str.split, captions))
    tokens = list(map(lex_chunk, chunks))
    depends = np.array([cut is None for cut in tokens], bool)[ids]  # (T,)
    # captions that are cut as a whole, with the beginning of the next two
    whole = set(np.repeat(np.arange(len(captions)), lengths)[depends].tolist())
    whole |= set((ends[ends > 0] - 1).tolist())  # the end of a text matters
    begin, nothing = np.cumsum(lengths) - lengths, len(tokens)
    tokens.append([])
    for s in whole:
        here = ids[begin[s]:begin[s] + lengths[s]]
        here[:] = nothing
        here[:1] = len(tokens)  # the first chunk stands for the whole caption
        following = captions[s + 1:min(s + 3, ends[ends > s][0])]
        tokens.append(lex(captions[s], *(line[:30] for line in following)))
    words, *parts = factorize(cut or [] for cut in tokens)
    return words, *expand(ids, lengths, *parts)


def tokenize(captions):
    """
    Captions, a list of str -> a list of tokens for each, in lower case, without punctuation. The
    Java program reads the list as one text, a caption a line, and the next line can matter: the
    period of "letter X." is dropped if "The ..." follows. So pass all references in the order of
    the file, and the candidates apart.
    """
    words, ids, lengths = read(captions)
    return grouped(np.array(words, object)[ids], lengths)


# --------------------------------------------------------------------------------------------------
# The lexer. A table, not an idea: skip it on first reading. It cuts words as the Penn Treebank
# does, in the dialect of coco-caption's Java program (CoreNLP 3.4.1). There the longest match wins;
# here the rules are in such an order that the first match is the longest. What no rule takes
# (commas, quotes, emoji) is dropped. Scans that may fail are short, {0,30}: else "a,a,a,..." would
# take quadratic time.

# in Python's \w, but neither letter nor digit to Java
NOT = "_²³¹¼-¾⁰-₉⅐-↉①-➓㆒-㆕㈠-㊿\U00010000-\U0010ffff"
# a letter; a letter or digit; an ASCII letter or digit
L, W, A = rf"[^\W\d{NOT}]", rf"[^\W{NOT}]", "[A-Za-z0-9]"
M = "".join(c for c in map(chr, range(0x300, 0xED0)) if unicodedata.category(c) in ("Mn", "Mc"))
# accents that come apart from their letter
M = f"(?:[{M}]|&[aeiouAEIOU](?:acute|grave|uml);)"
# apostrophes; n't; it's, they're
Q, QQ, NT, CLITIC = "['’]", "['’‘‛`]", "[nN][`'’‘‛][tT]", "(?i:[smd]|re|ve|ll)"
# U.S; the period of "dog.," is kept, as of "etc.,"
DOTTED, DOT = r"[A-Za-z](?:\.[A-Za-z])+", r"(?:\.(?=[,;:、]))?"
# d'Angelo, O'Neill: two more letters at least
NAME = f"[dolDOL]{QQ}{L}"
COMPOUND = f"{W}+(?:[-_֊‐‑](?:{NAME})?{W}+)*"              # snow-covered
# the period after an address ends the sentence
URL, URL_END = r'[^\s"<>|()]', r'[^\s"<>|.!?(){},-]'
# 123-4567; cannot, but not cannot-do
PHONE, ALONE = r"[0-9]{3,4}[- \xa0]?[0-9]{3,5}", rf"(?!\w|-{W}|{Q}{CLITIC})"
AREA_PHONE = rf"(?:[0-9]{{2,4}}[- \xa0])?[0-9]{{2,4}}[- \xa0]{PHONE}"
ABBREVIATED = """adj adm adv al ala alex apr ariz assn assoc asst attys? aug ave bancorp bhd bldg
    blvd brig bros calif capt cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det
    drs? elec ens esq est etc ext feb fla fri ft ga gen govs? hon inc ind insp intl invt jan jos
    jr jul jun kans? ky lieut lt ltd maj mar md messrs mfg mich minn mlle mme mo mon mont mrs? ms
    msgr mt mtg natl neb nev nov oct okla penn pfc ph plc ppte ppty pptys pres profs? ptes? ptys?
    pvt rd reps? rev rt sens? sept? seq sfc sgt spc sq sr ste? supts? sys tel tenn thu thurs treas
    tues? univ va vs vt wed wisc? wm wyo"""
# abbreviations only before a number: no. 5
NUMBERED = r"(?i:nos?|figs?|art|ca|op|pp|prop)\."
CAPITAL = lambda text: "|".join(f"{word[0]}(?i:{word[1:]})" for word in text.split())
# abbreviations only with a capital: ore., la.
STATES = CAPITAL("Ark Az Del Ill La Mass Miss Ore Pa Tex Wash")
# each cut after the third letter
TWO_WORDS = {"cannot", "gotta", "gonna", "wanna", "lemme", "gimme"}
OPENERS = CAPITAL(r"""About According Additionally After An A As At But Earlier He Her Here
    However If In It Last Many More Mr\. Ms\. Now Once One Other Our She Since So Some Such That
    The Their Then There These They This We When While What Yet You""")
# <br/>, <a href="dog">
TAG = (r"</?[A-Za-z][\w:-]*(?:[^\S\n]+[\w:-]+(?:[^\S\n]*=[^\S\n]*"
       r"""(?:"[^"<>\n]*"|'[^'<>\n]*'))?)*[^\S\n]*/?>|<[!?][A-Za-z-][^<>\n]*>""")

WORDS = [  # what begins with a letter or a digit
    # http://dog.org/cat
    rf"(?i:https?)://{URL}+{URL_END}",
    # me@dog.org
    rf'{A}{URL}{{0,30}}@(?:[^\s"<>|().]+\.)*[^\s"<>|().]+',
    # www.dog.tv/cat
    r'(?:www\.(?:[^\s"<>|.!?(){},]{1,30}\.){1,8}[A-Za-z]{2,4}'
    r"""|(?:[^\s!"$'(),-_`{|}]{1,30}\.){1,8}(?:com|net|org|edu))""" # dog.org
    rf"(?:/{URL}+{URL_END}|(?![\w-]|[.!?]{L}))",
    # 22 3/4: one token, with a space
    r"\d{1,2}/\d{1,2}-\d{2,4}|\d{1,4}[- \xa0]\d{1,4}(?:\\?/|⁄)\d{1,4}",
    # 555 123 4567: the same
    rf"(?=[0-9-]{{2,15}}[ \xa0]){AREA_PHONE}",
    # and/or, dark-red/blue
    rf"{A}+(?:-[A-Za-z]+){{0,2}}(?:\\?/{A}+(?:-[A-Za-z]+){{0,2}}){{1,2}}|\d{{1,4}}⁄\d{{1,4}}",
    # 1,000-foot, non-U.S.
    rf"(?:{A}{{1,30}}[.,][A-Za-z0-9.,]{{0,30}}(?=-{A})|{A}+(?:-{A}+)*-{DOTTED}\.)"
    rf"(?:-(?:{DOTTED}\.|{A}+))*{DOT}",
    # U.S., p.m., Ph.D.
    rf"(?:{DOTTED}|(?i:ph|ed)\.[dD])\.(?!{L})",
    # dog.The: no space, no cut; no. 5
    rf"{L}{W}*(?:[.!?]{L}{W}*)+{DOT}|{NUMBERED}(?=\s?\d)",
    # st.
    rf"(?=[A-Za-z]{{2,7}}\.)(?:(?i:{'|'.join(ABBREVIATED.split())})|{STATES})\.",
    # J. Crew; but "vitamin C. The dog" and "vitamin C. <b>" end a sentence
    rf"[A-Za-z]\.(?!\s+(?:{OPENERS}|{TAG})\s)",
    # words on a list of the Java program
    rf"(?i:s&ls|s&p-500|c\+\+|c#|cap{Q}n|c{Q}est|(?:pro|anti)-(?!{W}))",
    # and the rest of that list
    r"(?i:cont'd\.|nor'easter|c'mon|e'er|s'mores|ev'ry|li'l|nat'l)",
    # AT&T, US$, 12:30
    rf"[A-Z]+(?:[+&][A-Z]+)+{DOT}|[A-Z]+\$|\d+(?:[.:,٫٬]\d+)+",
    # d'oeuvres
    rf"(?![a-zA-Z]{QQ}(?i:re|ve|ll)(?!{W})){NAME}{COMPOUND}{DOT}",
    # ol' dog, j'adore, y'all
    rf"(?i:dunkin|somethin|ol|[ldj]|y(?={Q}{L})){Q}(?!{CLITIC})",
    # B'Gosh
    rf"[A-HJ-XZn]{QQ}(?!(?i:re|ve|ll)(?!{L})){L}{{2}}{L}*",
    # ma'am
    rf"{L}{{2}}{L}*(?<=[aeiouyAEIOUY]){QQ}(?!{CLITIC}(?!{L}))[aeiouA-Z]{L}*",
    # does|n't
    rf"{NT}|[A-Za-z]+(?<![nN])(?={NT})",
    # can|not, gon|na
    rf"(?i:{'|'.join(f'{word[:3]}(?={word[3:]}{ALONE})' for word in TWO_WORDS)})",
    # e + accent; dog, 8th, dog_cat: nearly all there is
    rf"(?:{L}+|(?={M}))(?:{M}+{L}*)+|{COMPOUND}{DOT}"]
OTHERS = [
    # ^_^ (-_-)
    r"[-x^=~<>']_[-x^=~<>']|\([-x^=~<>'][-_.]?[-x^=~<>']\)",
    # :) ;-D
    r"[<>]?[:;=][-o*']?[()DPdpO\\{@|[\]](?=[^A-Za-z0-9])",
    # -lrb-, +20 7946 0000, (555) 123-4567
    rf"(?i:-[lr][rcs]b-)|\+{{1,2}}{AREA_PHONE}|\([0-9]{{2,3}}\)[ \xa0]?{PHONE}",
    # 'n', 'em, '80s
    rf"(?i:'n'|{Q}n(?=\s|$)|’n’?|{Q}(?:em|till?|cause|[2-9]0s)|'t(?=is|was))|{Q}\d\d(?=\s)",
    # quotes; dog|'s
    r"''|[`‘’‚‛“”„‟‹›«»]{2}|(?i:'(?:[smd](?![a-z])|(?:re|ve|ll)(?=[^a-z]))|’(?:[smd]|re|ve|ll))",
    TAG + "|<<|>>",
    # &gt; #hashtag @dog
    rf"&(?:[lg]t|#\d+|HT|TL|UR|LR|QC|QL|QR|odq|cdq);|#{L}+|@[A-Za-z_][A-Za-z_0-9]*",
    # -5 .50 !! and, to drop, -- ...
    r"[-+]?\d*(?:[.:,٫٬]\d+)+|[-+]\d+|\*+|(?:\\\*){1,3}|#+|@+|_+|[?!]+|-+|\.{3,5}"
    # m²
    r"|[⁺⁻₊₋]?(?:[⁰¹²³⁴-⁹]+|[₀-₉]+)",
    # one symbol: $ % ½ ®; and the end of a caption, see tokenize
    r"[$-&(-+/<=>[-^{|}~‚„‟¡-§©¬®°±´¶·¸¿¼½¾×÷;·։־׀׃׆׳״؀-؃؆-،ؔ؛؞؟٪٭۔܀-܍߶-߸।"
    r"॥฿๏᾽‖‗†-‣‰-›※‾-⁂⁄⁺-⁾₊-₎₠₤€℀-⅏⅓-⅞←-⯿、。〒・"
    r"！-／：-＠［-･￠￡￥￦]|\n"]
LEXER = re.compile(f"(?={W}|{M})(?:{'|'.join(WORDS)})|{'|'.join(OTHERS)}")
# chunks that depend on neighbours
SOCIAL = re.compile(rf"^\d\d|^\d\\?[/⁄]|<|(?<![\w'’.])(?:[A-Za-z]\.|{NUMBERED})")

# how the Java program writes what it found, and what coco-caption drops
CLEAN = {**dict.fromkeys(map(ord, "\n\r\v\f\x85\u2028\u2029"), " "), 0xAD: None,
         **dict(zip(range(0x91, 0x95), "‘’“”"))}
ENTITIES = {"&nbsp;": " ", "&apos;": "’", "&amp;": "&", "&quot;": '"',
            "&mdash;": "—", "&ndash;": "—", "&md;": "—"}
ENTITY = re.compile("|".join(ENTITIES), re.IGNORECASE)
BRACKETS = {"[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-", "&lt;": "<", "&gt;": ">"}
STRAIGHT = str.maketrans({"‘": "`", "‛": "`", "‹": "`", "’": "'", "›": "'", "“": "``", "«": "``",
                          "”": "''", "»": "''"})
WRITTEN = str.maketrans({"(": "-lrb-", ")": "-rrb-", " ": "\xa0", "¢": "cents", "£": "#",
                         "€": "$", "¤": "$", "₠": "$", "\x80": "$",
                         "¼": "1/4", "½": "1/2", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"})
DROPPED = set("'' ' `` ` . ? ! , : ; - -- --- ---- ... .... .....".split())


@functools.lru_cache(1 << 16)
def spell(token):
    """A token as the Java program writes it; "" if coco-caption drops it. It keeps -lrb-."""
    quotes = rf"[`‘’‚‛“”„‟‹›«»]+|’{CLITIC}|[nN]{QQ}[tT]"
    if not token.isascii() and re.fullmatch(quotes, token):
        token = token.translate(STRAIGHT)
    token = BRACKETS.get(token, token).translate(WRITTEN).lower()
    return "" if token in DROPPED else token


def lex(line, *next_lines):
    """The tokens of a line. Those at its end can depend on the next lines."""
    text = "\n".join(line.translate(CLEAN) for line in (line, *next_lines))
    text = ENTITY.sub(lambda match: ENTITIES[match[0].lower()], text)
    first_line = itertools.takewhile("\n".__ne__, LEXER.findall(text))
    return [token for token in map(spell, first_line) if token]


def lex_chunk(chunk):
    """The tokens of what is between two spaces, or None if they depend on what is beyond."""
    if chunk.isascii() and chunk.isalpha() and chunk.lower() not in TWO_WORDS:
        return [chunk.lower()]  # nearly all there is
    return None if SOCIAL.search(chunk) else lex(chunk + " ")


# --------------------------------------------------------------------------------------------------

if __name__ == "__main__":
    from fineweb import configure, die, save_json

    configure(globals(), positional=("results", "captions"))
    if not (results and captions):
        die("give a results file and a captions file: python cider.py results.json captions.json")
    try:
        images, references = read_captions(captions)
        candidate_of = read_results(results)
        ids = [str(image["id"]) for image in images]
        unknown = sorted(candidate_of.keys() - set(ids))
        if unknown:
            die(f"{results}: {len(unknown)} images are not in {captions}, such as image_id "
                f"{', '.join(unknown[:5])}")
        missing = [i for i in ids if i not in candidate_of]
        if missing and not subset:
            die(f"{results}: {len(missing)} images of {captions} have no caption, such as image_id "
                f"{', '.join(missing[:5])} (subset=True scores the others)")
        kept = [n for n, i in enumerate(ids) if i in candidate_of]
        images = [images[n] for n in kept]
        references = [references[n] for n in kept]
        candidates = [candidate_of[ids[n]] for n in kept]
        scores, per_image = evaluate(candidates, references)
    except (ValueError, OSError) as problem:
        die(problem)
    if out:
        rows = []
        for image, caption, *each in zip(images, candidates, *per_image.values()):
            rows.append(dict(image_id=image["id"], caption=caption, **dict(zip(per_image, each))))
        save_json(out, dict(scores=scores, images=rows))
    print(f"{len(images):,} images, {sum(map(len, references)):,} references\n\n"
          "metric     x100     raw")
    for metric, score in scores.items():
        print(f"{metric:8} {100 * score:6.2f}  {score:.4f}")
    if len(images) == 1:
        print("CIDEr of one image is always 0: all its n-grams are in every image")
    ranking = np.argsort(-per_image["CIDEr"], kind="stable").tolist()
    for title, numbers in (("best", ranking[:show]), ("worst", ranking[::-1][:show])):
        for n in numbers:
            print(f"{title} CIDEr {per_image['CIDEr'][n]:.3f}, image {images[n]['id']}: "
                  f"{candidates[n]!r}, a reference: {references[n][0]!r}")
