# SPDX-License-Identifier: MIT
"""What is searched and asked: corpus, questions, search engines. Then the built-in agent's lessons.

    >>> BM25(load_corpus("tiny_corpus.jsonl")).search(["capital Paris"], k=1)[0][0]["contents"]
    '"Paris"\\nParis is the capital of France.'
"""
import argparse, contextlib, copy, glob, gzip, http.client, http.server, itertools, json, math, os
import pathlib, random, re, string, sys, time, torch, urllib.request
from datasets import load_dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
# --------------------------------------------------------------------------- mistakes of the user
def stop(message):
    """Ends the program with one sentence and status 2. Of torchrun's processes the first speaks."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error:", message, file=sys.stderr)
    sys.exit(2)

def check(ok, message):
    if not ok:
        stop(message)

@contextlib.contextmanager
def blame(what, errors=Exception):
    """An error in this block is the fault of `what`, which the user supplied: stop() names both."""
    try:
        yield
    except errors as error:
        stop(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

def check_folder(name):
    """Is --model `name` the folder of a run that holds no model?"""
    folder = pathlib.Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        runs = sorted(folder.glob("lambda_*"))
        check(not runs, f"--model {name}: a folder of several runs; take one of them: {runs[:1]}")
        check(not (folder / "flags.json").exists(),
              f"--model {name}: the run has not made its model yet; go on by --resume {name}")
# -------------------------------------------------------------------------- corpus and questions
def read_rows(name, config=None, split=None):
    """Yields (row, "NAME, row N") of a file, or of a folder or hub name that load_dataset knows."""
    with blame(name):
        ending = name.lower()
        if ending.endswith((".json", ".jsonl", ".gz")):
            text = pathlib.Path(name).read_bytes()
            if ending.endswith(".gz"):
                text = gzip.decompress(text)
            rows = json.loads(text) if text.startswith(b"[") else text.splitlines()
        elif ending.endswith(".parquet"):
            # "train" is what load_dataset calls the rows of a single file.
            rows = load_dataset("parquet", data_files=glob.escape(name), split="train")
        else:
            check(not os.path.isfile(name), f"{name}: its name must end in jsonl, gz or parquet")
            rows = load_dataset(name, config, split=split)
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        if isinstance(row, bytes):  # a line of a jsonl file
            if not row.strip():
                continue
            with blame(where):
                row = json.loads(row)
        yield row, where

def load_corpus(path):
    """Passages from jsonl[.gz] in Search-R1's form: dicts with `contents`, '"Title"\\ntext'."""
    rows = list(read_rows(str(path)))
    check(rows, f"{path}: the corpus is empty")
    for row, where in rows:
        good = isinstance(row, dict) and isinstance(row.get("contents"), str)
        check(good, f"{where}: a passage needs a text 'contents'")
        row.pop("instead_of", None)  # a mark that only ErringRetriever shall set
    return [row for row, _ in rows]

def load_questions(sources, part):
    """Questions of a set, or of several with commas between. A set is a file, a corpus (its split
    `part`), or a folder or hub name: me/bench, me/bench:nq, me/bench:nq:test[:99].
    Returns dicts with "question", "golden_answers" (a list), "set", "where", perhaps "prompt"..."""
    entries = [sources] if os.path.exists(sources) else sources.split(",")  # a path may hold commas
    check(all(source.strip() for source in entries), f"{sources!r}: nothing beside a comma")
    base_names, sets = [os.path.basename(source) for source in entries], {}
    for source in entries:
        fields = [source] if os.path.exists(source) else source.split(":", 2)
        name, config, split = fields + [None] * (3 - len(fields))
        title = config or os.path.basename(name).partition(".")[0]
        if base_names.count(os.path.basename(source)) > 1:  # nq/dev.json,hotpot/dev.json: nq_dev
            title = f"{os.path.basename(os.path.dirname(os.path.abspath(name)))}_{title}"
        check(title not in sets, f"{sources}: two sets have the name {title}")
        sets[title] = []
        for row, where in read_rows(name, config or None, split or part):
            with blame(where):
                questions = [row]
                if "contents" in row and not row.get("question") and not row.get("prompt"):
                    questions = [q for q in row.get("questions") or [] if q["split"] == part]
                for q in questions:
                    sets[title].append(checked(q, where, title if len(entries) > 1 else None))
        check(sets[title], f"{source}: no questions for '{part}'")
    return list(itertools.chain(*sets.values()))

def checked(row, where, title):
    """The row as load_questions returns it. title: of its set, if there are several."""
    truth = (row.get("reward_model") or {}).get("ground_truth")  # of Search-R1 and verl
    if isinstance(truth, dict):
        truth = truth.get("target")
    answers = texts_of(row.get("golden_answers")) or texts_of(truth) or texts_of(row.get("answer"))
    parts = [m[field].strip() for m in row.get("prompt") or [] for field in ("role", "content")]
    question = row.get("question") or (parts[-1] if parts else "")
    check(question.strip() and all(parts) and answers, f"{where}: it needs 'golden_answers', and "
          "'question' or a 'prompt' of messages with 'role' and 'content'")
    by_hops = f"{row['hops']}hop" if row.get("hops") else None
    name = row.get("data_source") or title or by_hops or row.get("set")
    check(name != "average", f"{where}: no set may be called average, like the mean of all sets")
    return row | {"question": question, "golden_answers": answers, "set": name and str(name),
                  "where": where}

def texts_of(answers):
    """One answer or several, perhaps a list that is written as text -> a list of texts."""
    if isinstance(answers, str) and answers.startswith("["):
        with contextlib.suppress(ValueError):
            answers = json.loads(answers)
    if not isinstance(answers, list):
        answers = [answers]
    texts = [str(answer) for answer in answers if isinstance(answer, (str, int, float))]
    return [text for text in texts if text.strip() not in ("", "nan")]  # an empty cell reads as nan

def keep_fitting(env, questions, context):
    """The questions of --hops searches (or all) whose longest possible episode fits the context."""
    some, hops = [], env.cfg.hops
    for q in questions:
        with blame(f"{q['where']}: prompt"):
            fits = len(env.reset(q).ids) + env.longest <= context
        if fits and (hops == 0 or q.get("hops", hops) == hops):  # without "hops": it stays
            some.append(q)
    print(len(some), "of", len(questions), "questions fit --hops and the model's context")
    check(some, f"no question of --hops {hops} fits into {context} tokens with --max_turns turns")
    return some

def normalize_answer(text):
    """As Search-R1: lower case, no punctuation, no articles, single spaces."""
    letters = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", letters).split())

def exact_match(prediction, golden_answers):
    """1.0 if the prediction equals a golden answer, both normalised, else 0.0. An answer of which
    that leaves nothing, such as "A", is compared as it is. An empty prediction is never right."""
    for answer in [golden_answers] if isinstance(golden_answers, str) else golden_answers:
        form = normalize_answer if normalize_answer(answer) else str.strip
        if form(prediction) and form(prediction) == form(answer):
            return 1.0
    return 0.0
# ----------------------------------------------------------------------------------------- search
class BM25:
    """Okapi BM25: the score of a passage is the sum of idf * tf * (k1 + 1) / (tf + norm) over the
    query's terms. tf: how often the passage holds the term; idf, norm: see below."""
    def __init__(self, passages, k1=1.2, b=0.75):
        self.passages = passages
        self.index = {}  # term -> (its passages, what it adds to their scores)
        lengths = torch.zeros(len(passages), dtype=torch.float64)
        places = {}  # term -> its passages, each as often as it holds the term
        for d, passage in enumerate(passages):
            terms = words(passage["contents"])
            lengths[d] = len(terms)
            for term in terms:
                places.setdefault(term, []).append(d)
        norm = k1 * (1 - b + b * lengths / lengths.mean())
        for term, repeated in places.items():
            ids, tf = torch.tensor(repeated).unique_consecutive(return_counts=True)
            idf = math.log(1 + (len(passages) - len(ids) + 0.5) / (len(ids) + 0.5))
            self.index[term] = ids, tf.double() * (k1 + 1) / (tf + norm[ids]) * idf

    def search(self, queries, k):
        """For each query the k best passages that share a term with it, best first, as copies with
        their `score`. Equal scores stay in the corpus' order."""
        found = []
        for query in queries:
            scores = torch.zeros(len(self.passages), dtype=torch.float64)
            for term in words(query):
                if term in self.index:
                    scores.index_add_(0, *self.index[term])
            # topk() is fast but mixes ties. So it only tells the k-th score; the few passages that
            # reach it are sorted, stably.
            kth = scores.topk(max(1, min(k, len(scores)))).values[-1]
            ids = ((scores >= kth) & (scores > 0)).nonzero()[:, 0]
            best = ids[scores[ids].argsort(descending=True, stable=True)[:k]].tolist()
            found.append([self.passages[d] | {"score": scores[d].item()} for d in best])
        return found

# Characters that are terms by themselves, as no spaces part words: Thai, Lao, Burmese, Khmer,
# Japanese, Chinese. And accents and vowel signs, which \w does not know as parts of a word.
ALONE = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
         "\U00020000-\U0003ffff")
SIGNS = "\u0300-\u036f\u0591-\u05c7\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
TERM = re.compile(rf"[{ALONE}]|(?:[^\W{ALONE}]|[{SIGNS}])+")

def words(text):
    """BM25's terms, in lower case: "It is .fr 東京" -> it, is, fr, 東, 京."""
    return TERM.findall(text.lower())

class ErringRetriever:
    """An engine that fails: with probability `noise` a query finds random passages, each of which
    remembers what it stands `instead_of`."""
    def __init__(self, engine, passages, noise):
        self.engine, self.passages, self.noise = engine, passages, noise

    def search(self, queries, k):
        found = self.engine.search(queries, k)
        for hits in found:
            if torch.rand(()) < self.noise:
                for i, d in enumerate(torch.randint(len(self.passages), (len(hits),))):
                    hits[i] = self.passages[d] | {"instead_of": hits[i]["contents"]}
        return found

class HTTPRetriever:
    """A server of Search-R1's protocol: {"queries": [...], "topk": k, "return_scores": true} gets
    {"result": [[{"document": {"contents": ...}, "score": x}, ...], ...]}, a list for each query.
    It may be busy (no connection, time-out, overload), which will pass, or refuse (all else)."""
    def __init__(self, url, timeout=300, tries=7):
        self.url, self.timeout, self.tries = url, timeout, tries
        self.in_vain = 0  # requests in a row of which the server has refused everything
        with blame(f"--retriever_url {url} must be http://HOST:PORT/PATH"):
            address = urllib.parse.urlsplit(url)
            if address.scheme not in ("http", "https") or not address.hostname or " " in url \
                    or address.port == 0:
                raise ValueError(url)
            proxies, host = urllib.request.getproxies(), f"{address.hostname}:{address.port}"
        # Addresses of this machine never go through a proxy.
        local = re.match(r"localhost$|127\.|::1$", address.hostname)
        if local or urllib.request.proxy_bypass(host):
            proxies = {}
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler(proxies))
        self.name = f"--retriever_url {url}" + (f", proxies {proxies}" if proxies else "")

    def request(self, queries, k, tries):
        """Passages for each query; None if the server refuses. OSError: it was busy each time."""
        body = json.dumps({"queries": queries, "topk": k, "return_scores": True}).encode()
        for attempt in range(tries):
            request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
            try:
                with self.opener.open(request, timeout=self.timeout) as reply:
                    found = passages_in(json.load(reply)["result"], len(queries), k)
                self.in_vain = 0
                return found
            except (OSError, http.client.HTTPException) as error:
                failure = error
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
                return self.warn(queries, error)
            status = getattr(failure, "code", None)  # of HTTP, if it came so far
            if status is not None and status <= 500 and status not in (408, 429):
                return self.warn(queries, failure)
            wait = (getattr(failure, "headers", None) or {}).get("Retry-After") or ""
            if attempt + 1 < tries:
                time.sleep(min(int(wait), 300) if wait.isdecimal() else 2 ** attempt)
        raise OSError(f"{self.name}: {failure!r:.300}, {tries} times")

    def warn(self, queries, error):
        if len(queries) == 1:  # of several, each will be asked alone
            print(f"WARNING: {self.name} refuses {queries}: {error!r:.200}", file=sys.stderr)

    def search(self, queries, k):
        """As BM25.search. If a request is refused, each query is asked alone, since one of them may
        be the cause; it finds nothing if it is refused again. OSError if the server stays busy, or
        has refused all of three requests in a row: then it is no search server."""
        if not queries:
            return []
        found = self.request(queries, k, self.tries)
        if found is None:
            self.in_vain += 1  # request() sets it to 0 at any answer
            alone = [self.request([query], k, self.tries) for query in queries]
            found = [[] if hits is None else hits[0] for hits in alone]
            if self.in_vain == 3:
                raise OSError(f"{self.name}: it has refused all of three requests")
        return found

    def probe(self):
        """stop() unless the server answers a plain query, be it with nothing. Returns self."""
        with blame(self.name, OSError):
            check(self.request(["capital"], 1, tries=1) is not None, f"{self.name}: no such server")
        return self

def passages_in(result, count, k):
    """The first k passages of each of `count` lists; some error if it is something else."""
    if len(result) != count:
        raise ValueError(f"{len(result)} lists for {count} queries")
    found = [[hit.get("document", hit) for hit in hits[:k]] for hits in result]
    for passage in itertools.chain(*found):
        passage["contents"].partition("\n")  # is it a text?
        passage.pop("instead_of", None)
    return found

class Handler(http.server.BaseHTTPRequestHandler):
    timeout = 60  # seconds: a client that never ends its request shall not hold a thread for ever

    def do_POST(self):
        try:
            length = int(self.headers["Content-Length"])
            if not 0 <= length <= 10**8:
                raise ValueError("Content-Length")
            asked = json.loads(self.rfile.read(length))
            queries, k = asked["queries"], asked.get("topk")
            k = 3 if k is None else k
            if not isinstance(queries, list) or type(k) is not int or k < 1:
                raise TypeError("'queries' must be a list of texts, 'topk' a number from 1")
            result = self.server.engine.search(queries, k)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
            return self.send_error(400, "Not a request in Search-R1's protocol", repr(error)[:300])
        for hits in result:
            for i, hit in enumerate(hits):
                score = hit.pop("score")
                hit.pop("questions", None)  # they tell the answers
                hits[i] = {"document": hit, "score": score} if asked.get("return_scores") else hit
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps({"result": result}).encode())

def serve(engine, port, host="127.0.0.1"):
    """A server of Search-R1's protocol; its serve_forever() starts it. port 0: any free one."""
    http.server.ThreadingHTTPServer.request_queue_size = 1024  # connections that may wait; else 5
    server = http.server.ThreadingHTTPServer((host, port), Handler)
    server.engine = engine
    server.handle_error = lambda *_: None  # no traceback for a client that has left
    return server
# --------------------------------------------------------------- how passages stand in an episode
PROMPT = """Answer the question. Whenever you learn something, reason first, between <think> and
</think>. If you lack a fact, search for it with <search> your query </search>; passages come back
between <information> and </information>. You may search several times. Once you know enough, finish
with <answer> your answer in as few words as possible </answer>.\nQuestion: {question}\n"""
CORRECTION = ("\n\nThis was neither a search nor an answer. Write <search> query </search> to "
              "search, or <answer> answer </answer> to finish.\n\n")
OPEN, CLOSE = "\n\n<information>", "</information>\n\n"
TAG = re.compile(r"</?(?:think|search|information|answer)>")

def clean(text, forbidden):
    """Text from outside without forbidden words, "</a>" -> "< /a>", and without lone surrogates."""
    for name in forbidden:
        text = text.replace(name, name[:1] + " " + name[1:])
    return re.sub("[\ud800-\udfff]", "\ufffd", text)

def format_passages(passages):
    """Passages as text, one a line. Tags in them are broken, so that they cannot end the block."""
    lines = []
    for i, passage in enumerate(passages, 1):
        title, _, text = passage["contents"].partition("\n")
        lines.append(f"Doc {i}(Title: {title}) {text}")
    text = "\n".join(lines)
    return clean(text, TAG.findall(text)) or "No passage matches this query."

def text_in_tag(tag, text):
    """Between the first </tag> and the last <tag> before: "<a> x <a> y </a> z" -> "y"; or None."""
    before, closed, _ = text.partition(f"</{tag}>")
    _, opened, inside = before.rpartition(f"<{tag}>")
    return inside.strip() if opened and closed else None

def show(env, e):
    """Prints an episode by its loss mask: what is not trained stands in [[ ]]."""
    reward = f" -> reward {e.reward:g}" if e.question["golden_answers"] else ""
    print(f"\n{e.question['question']}{reward}")
    places = range(e.action_id.index(1), len(e.ids))
    for action, some in itertools.groupby(places, key=lambda t: e.action_id[t]):
        text = env.tok.decode([e.ids[t] for t in some])
        print(text if action > 0 else f"[[{text}]]", end="")
    print("\n")
# -------------------------------------------------------------------- the built-in agent's lessons
# The built-in agent starts with random weights. Before GRPO it imitates scripted episodes, each in
# a scrambled world, where Kabul may be Peru's capital: it cannot learn facts, only to look them up.
# The script errs on purpose, since GRPO learns from right and wrong answers. Most of all GRPO shall
# cure an answer after one search of two, whose probability is --early_answers. The other choices:
GOES_ASTRAY = 0.1     # before a search: it goes on with another question, so that it answers wrong
ASKS_IN_FULL = 0.5    # its first query is the question, not a name: the agent shall try both
SEARCHES_AGAIN = 0.4  # after a search without the fact; else it answers with the last name it knows
READS_RIGHT = 0.95    # it takes the right name out of a passage, not any name
SEARCH = "<think> {thought}I look up {name} </think> <search> {query} </search>"
ANSWER = "<think> {thought}</think> <answer> {name} </answer>"

def tiny_agent(passages, questions, top_k):
    """(tokenizer, model), untrained: a Qwen2 of 0.17 million parameters with an episode's words."""
    texts = [CORRECTION, OPEN, CLOSE, SEARCH, ANSWER] + [q["question"] for q in questions]
    texts.append(format_passages([]))  # what a search says that finds nothing
    texts.append(format_passages(passages[:top_k]))  # Doc 1, Doc 2, ...
    texts += [format_passages([passage]) for passage in passages]
    vocab = Tokenizer(models.WordLevel(unk_token="<unk>"))
    token = Regex(TAG.pattern + r"|\w+|[^\w\s]")  # a tag, a word or a punctuation mark
    # "removed" drops what matches, and invert=True all the rest instead: spaces.
    vocab.pre_tokenizer = pre_tokenizers.Split(token, "removed", invert=True)
    vocab.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"]))
    tok = PreTrainedTokenizerFast(tokenizer_object=vocab, eos_token="<eos>", unk_token="<unk>")
    return tok, Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tok), hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=32, max_position_embeddings=1024,
        tie_word_embeddings=True, initializer_range=0.1, tokenizer_class="PreTrainedTokenizerFast"))

def check_lessons(passages, questions):
    """The script needs a question's `hops` and its `path`: the names that lead to the answer."""
    known = {word for passage in passages for word in re.findall(r"\w+", passage["contents"])}
    for q in questions:
        path, hops = q.get("path") or [], q.get("hops") or 0
        good = isinstance(path, list) and isinstance(hops, int) and len(path) - 1 == hops >= 1
        check(good and all(name in known for name in path), f"--warm_steps: {q['where']} needs "
              "'hops' and a 'path' of 'hops' + 1 words that stand in passages")

def scrambled(passages, questions):
    """(passages, questions) of a world in which names have changed places with others of a kind:
    those that fit into the same question, such as "___ is the capital of which country?"."""
    kind = {}  # name -> the question into whose gap it fits: Kabul and Lima, the one above
    for q in questions:
        if q["hops"] == 1:
            kind[q["path"][0]] = q["question"].replace(q["path"][0], "___")
    new_names = {}
    for gap in dict.fromkeys(kind.values()):  # each once, in order
        names = [name for name in kind if kind[name] == gap]
        new_names.update(zip(names, random.sample(names, len(names))))

    def rename(text):
        return re.sub(r"\w+", lambda word: new_names.get(word[0], word[0]), text)

    world = [{"contents": rename(passage["contents"])} for passage in passages]
    asked = []
    for q in questions:
        path = [rename(name) for name in q["path"]]
        asked.append({"question": rename(q["question"]), "golden_answers": path[-1:],
                      "hops": q["hops"], "path": path})
    return world, asked

def demonstrate(env, question, questions):
    """A scripted episode: a search for each name of the path but the last, then the answer."""
    e, path = env.reset(question), question["path"]
    hop, thought, answer = 0, "", path[0]

    def act(text):  # as if the model had written it; returns this and the feedback
        ids, start = env.encode(text), len(e.ids)
        e.ids, e.action_id = e.ids + ids, e.action_id + [e.turn] * len(ids)
        env.respond([e])
        return env.tok.decode(e.ids[start:])

    while hop < question["hops"] and e.turn <= env.cfg.max_turns:
        if hop == 1 and random.random() < env.cfg.early_answers:
            break
        if random.random() < GOES_ASTRAY:
            path = random.choice([q["path"] for q in questions if q["hops"] == question["hops"]])
        query = path[hop]
        if hop == 0 and random.random() < ASKS_IN_FULL:  # with another name if it has gone astray
            query = question["question"].replace(question["path"][0], path[0])
        feedback = act(SEARCH.format(thought=thought, name=path[hop], query=query))
        texts = re.split(r"Doc \d+ ?\(.*?\)", text_in_tag("information", feedback))
        # The fact is the text with both this name and the next one.
        facts = [t for t in texts if set(path[hop:hop + 2]) <= set(re.findall(r"\w+", t))]
        if facts:
            hop += 1
            thought, answer = facts[0].strip() + " ", path[hop]
            if random.random() > READS_RIGHT:  # only in the answer; a next search is right
                answer = random.choice(questions)["path"][0]
        elif random.random() > SEARCHES_AGAIN:
            break
    act(ANSWER.format(thought=thought, name=answer))
    return e

EPISODES = 16  # of a lesson
LESSONS = 8    # in the same world; to make a new one takes a while
def lessons(env, passages, questions, steps):
    """Yields `steps` lessons, lists of scripted episodes."""
    env = copy.copy(env)  # it gets a retriever of its own
    for step in range(steps):
        if step % LESSONS == 0:
            world, asked = scrambled(passages, questions)
            env.retriever = ErringRetriever(BM25(world), world, env.cfg.retrieval_noise)
        yield [demonstrate(env, random.choice(asked), asked) for _ in range(EPISODES)]

def main():
    parser = argparse.ArgumentParser(description="BM25 over a corpus, in Search-R1's protocol.")
    corpus = pathlib.Path(__file__).with_name("tiny_corpus.jsonl")
    parser.add_argument("--corpus", default=str(corpus))
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: open to other machines")
    args = parser.parse_args()
    check(args.host, "--host is empty; 0.0.0.0 stands for all addresses of this machine")
    engine = BM25(load_corpus(args.corpus))
    with blame(f"--host {args.host} --port {args.port}"), contextlib.suppress(KeyboardInterrupt):
        serve(engine, args.port, args.host).serve_forever()

if __name__ == "__main__":
    main()
