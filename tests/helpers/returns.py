"""K-step returns of one rollout as the paper has them, in plain Python."""


def algorithm_1(q: list[float], m: list[float], k: int) -> list[float]:
    """The paper's Algorithm 1 for one rollout, as it stands there, with 0-based t: the last token is T − 1."""
    last = len(q) - 1
    g = [0.0] * len(q)
    for t in range(last, -1, -1):
        if t == last:
            g[t] = q[t]
        elif last - t < k:
            g[t] = (q[t] - m[t + 1]) + g[t + 1]
        else:
            g[t] = (q[t] - m[t + k]) + g[t + k]
    return g


def equation_7(q: list[float], m: list[float], k: int) -> list[float]:
    """Eq. 7: jumps of K steps until the end is passed, where the value is zero."""
    value = lambda t: m[t] if t < len(m) else 0.0  # noqa: E731
    return [sum(q[i] - value(i + k) for i in range(t, len(q), k)) for t in range(len(q))]


LITERAL = {"one-step": algorithm_1, "jump": equation_7}
