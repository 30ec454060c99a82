# SPDX-License-Identifier: MIT
"""A search engine small enough to read, or a server's; below it, the built-in agent and what it learns from.

    >>> engine = BM25(load_corpus("tiny_corpus.jsonl"))
    >>> engine.search(["capital Paris"], k=1)[0][0]["contents"]
    '"Paris"\\nParis is the capital of France.'
"""
import copy, gzip, json, math, random, re, time, urllib.request
from argparse import ArgumentParser
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

def words(text):
    """Lower-case words and numbers: the terms of a passage or a query. "It is .fr" -> it, is, fr."""
    return re.findall(r"\w+", text.lower())

def load_corpus(path):
    """Passages from jsonl (or .jsonl.gz), in Search-R1's corpus format: one object a line, with at least a
    string `contents`, '"Title"\\ntext', and no `id` twice. ValueError names the file and the line."""
    passages, seen, opener = [], set(), gzip.open if str(path).endswith(".gz") else open
    with opener(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                passage = json.loads(line)
            except ValueError as error:  # not JSON, or not UTF-8
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(passage, dict) or not isinstance(passage.get("contents"), str):
                raise ValueError(f"{path}, line {number}: a passage needs a string field 'contents'")
            if passage.get("id") is not None and repr(passage["id"]) in seen:
                raise ValueError(f"{path}, line {number}: the id {passage['id']!r} is there twice")
            seen.add(repr(passage.get("id")))
            passages.append(passage)
    if not passages:
        raise ValueError(f"{path}: the corpus is empty")
    return passages

class BM25:
    """Okapi BM25 over passages (dicts with a string `contents`), as an inverted index.

        score(q, d) = sum over terms t of q: idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * |d| / avg|d|))
        idf(t)      = ln(1 + (n - df + 0.5) / (df + 0.5))                           (never negative)

    tf: how often t stands in d; df: how many of the n passages hold t; |d|: words of d. A term that the
    query repeats counts each time. All but the choice of terms is known when the index is built: a term has
    two arrays there, its passages and what it adds to their scores; a query adds up those of its terms."""

    def __init__(self, passages, k1=1.2, b=0.75):
        self.passages = passages
        lengths, postings, self.index = torch.zeros(len(passages), dtype=torch.float64), {}, {}
        for d, passage in enumerate(passages):
            terms = words(passage["contents"])
            lengths[d] = len(terms)
            for term in terms:
                postings.setdefault(term, []).append(d)  # d as often as the term stands in it
        norm = k1 * (1 - b + b * lengths / (lengths.mean() or 1.0))
        for term, ids in postings.items():
            ids, tf = torch.tensor(ids).unique_consecutive(return_counts=True)
            idf = math.log(1 + (len(passages) - len(ids) + 0.5) / (len(ids) + 0.5))
            self.index[term] = ids, tf.double() * (k1 + 1) / (tf + norm[ids]) * idf

    def search(self, queries, k):
        """The k best passages for each of the queries, best first, as copies with their `score`; ties stand
        in corpus order. Returns lists of dicts, shorter than k where fewer passages share a term."""
        found = []
        for query in queries:
            scores = torch.zeros(len(self.passages), dtype=torch.float64)
            for term in filter(self.index.get, words(query)):
                scores.index_add_(0, *self.index[term])
            least = scores.topk(min(k, len(scores))).values[-1]  # of the k best
            ids = ((scores >= least) & (scores > 0)).nonzero()[:, 0]  # ascending; more than k if some tie
            best = ids[scores[ids].sort(descending=True, stable=True).indices[:k]]  # stable: in corpus order
            found.append([dict(self.passages[d], score=scores[d].item()) for d in best.tolist()])
        return found

CORRECTION = ("\n\nThis was neither a search nor an answer. Write <search> query </search> to search, or "
              "<answer> answer </answer> to finish.\n\n")
OPEN, CLOSE = "\n\n<information>", "</information>\n\n"
TAG = re.compile(r"</?(?:think|search|information|answer)>")

def information(passages):
    """Passages as text, one a line. A tag inside a passage is broken, so that it cannot close the block."""
    docs = [passage["contents"].partition("\n") for passage in passages]
    lines = [f"Doc {i}(Title: {title}) {text}" for i, (title, _, text) in enumerate(docs, 1)]
    return TAG.sub(lambda tag: "< " + tag[0][1:], "\n".join(lines)) or "No passage matches this query."

class HTTPRetriever:
    """A retrieval server that speaks Search-R1's protocol, instead of an index in memory: POST to url
    {"queries": [...], "topk": k, "return_scores": true}; it answers, for each query, with its hits,
    {"result": [[{"document": {"contents": ...}, "score": x}, ...], ...]}."""

    def __init__(self, url, timeout=60, tries=5):
        self.url, self.timeout, self.tries = url, timeout, tries

    def search(self, queries, k):
        """As BM25.search. Waits 1, 2, 4, ... seconds after a failure; OSError with the url after the last."""
        body = json.dumps({"queries": list(queries), "topk": k, "return_scores": True}).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.tries if queries else 0):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    found = json.load(reply)["result"]
                return [[dict(hit["document"], contents="" + hit["document"]["contents"], score=hit["score"])
                         for hit in hits] for _, hits in zip(queries, found, strict=True)]
            except (OSError, HTTPException, ValueError, KeyError, TypeError) as error:  # not the protocol
                if attempt == self.tries - 1:
                    raise OSError(f"retrieval server {self.url}: {error!r}, {self.tries} times") from error
                time.sleep(2 ** attempt)
        return []

def serve(engine, port):
    """A server for Search-R1's protocol in front of engine; port 0: any free one. See its serve_forever()."""
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            found = engine.search(asked["queries"], asked.get("topk") or 3)
            if asked.get("return_scores"):
                found = [[{"document": hit, "score": hit.pop("score")} for hit in hits] for hits in found]
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps({"result": found}).encode())
    return ThreadingHTTPServer(("", port), Handler)

# ------------------------------------------------------------- the built-in agent and its warm start
SEARCH = "<think> {thought}I look up {name} </think> <search> {query} </search>"
ANSWER = "<think> {thought}</think> <answer> {name} </answer>"

def tiny_agent(passages, questions, top_k):
    """(tokenizer, model), untrained: a Qwen2 of 0.17 million parameters that knows an episode's words."""
    texts = [CORRECTION, OPEN, CLOSE, SEARCH, ANSWER, information([]), information(passages[:top_k]),
             *map(information, zip(passages)), *(q["question"] for q in questions)]
    words, word = Tokenizer(models.WordLevel(unk_token="<unk>")), Regex(TAG.pattern + r"|\w+|[^\w\s]")
    words.pre_tokenizer = pre_tokenizers.Split(word, "removed", invert=True)
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"]))
    tok = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    return tok, Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=0.1, tokenizer_class="PreTrainedTokenizerFast"))

def scrambled(passages, questions):
    """A world in which each name stands for another of its kind, so that only reading helps. Returns its
    passages, its questions and its facts {the two names in a passage: the passage's text}."""
    kind = {q["path"][0]: q["question"].replace(q["path"][0], "") for q in questions if q["hops"] == 1}
    other = {}
    for group in dict.fromkeys(kind.values()):  # names that fit into the same question
        names = [name for name in kind if kind[name] == group]
        other.update(zip(names, random.sample(names, len(names))))
    rename = lambda text: re.sub(r"\w+", lambda word: other.get(word[0], word[0]), text)
    passages = [{"contents": rename(passage["contents"])} for passage in passages]
    texts = [passage["contents"].partition("\n")[2] for passage in passages]
    facts = {frozenset(other.keys() & re.findall(r"\w+", text)): text for text in texts}
    questions = [dict(q, question=rename(q["question"]), path=[*map(rename, q["path"])]) for q in questions]
    return passages, questions, facts

def demonstrate(env, question, questions, facts):
    """A scripted episode, imperfect on purpose: searches and quotes, mostly stops after one search, errs."""
    path, thought, name, actions = question["path"], "", "", []
    for hop in range(question["hops"]):
        if hop == 1 and random.random() < 0.6:
            break
        if random.random() < 0.1:  # goes after something else
            path = random.choice([q["path"] for q in questions if q["hops"] == question["hops"]])
        asked = question["question"].replace(question["path"][0], path[0])
        query = asked if hop == 0 and random.random() < 0.5 else path[hop]
        actions.append(SEARCH.format(thought=thought, name=path[hop], query=query))
        thought = facts[frozenset(path[hop:hop + 2])] + " "
        name = path[hop + 1] if random.random() < 0.95 else random.choice(questions)["path"][0]
    e = env.reset(question)
    for action in [*actions, ANSWER.format(thought=thought, name=name)]:
        ids = env.encode(action)
        e.ids, e.action_id = e.ids + ids, e.action_id + [e.turn] * len(ids)
        env.respond([e])
    return e

def lessons(env, passages, questions, steps):
    """Yields `steps` batches of 16 scripted episodes; after every eighth the world is another."""
    env = copy.copy(env)
    for step in range(steps):
        if step % 8 == 0:
            world, asked, facts = scrambled(passages, questions)
            env.retriever = BM25(world)
        yield [demonstrate(env, random.choice(asked), asked, facts) for _ in range(16)]

if __name__ == "__main__":
    parser = ArgumentParser(description="Serves BM25 over a corpus, in Search-R1's protocol.")
    parser.add_argument("--corpus", default="tiny_corpus.jsonl")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    serve(BM25(load_corpus(args.corpus)), args.port).serve_forever()
