"""Range searches by the error of a product against every candidate in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from range_oracle import CLOSE, error, grid_candidates, heavy, quantize

from jaxq.errors import JaxqError
from jaxq.solvers.output_ranges import linear_output_error, product_output_error


def linear_problem():
    rng = np.random.default_rng(10)
    x = heavy(10, 60, 8) * rng.lognormal(size=8).astype(np.float32)
    return x, rng.normal(size=(8, 5)).astype(np.float32)


def test_linear_output_error_is_coordinate_descent():
    """Each choice against all candidates, the whole search against float64 NumPy."""
    x, w = linear_problem()
    bits, steps = 3, 4
    zeros = range(8)
    exact = x.astype(np.float64) @ w
    x_all = grid_candidates(x, bits, zeros, steps)
    w_all = [grid_candidates(w[:, o], bits, zeros, steps, floor=1e-8) for o in range(5)]

    def best(candidates, error):
        return candidates[int(np.argmin([error(*c) for c in candidates]))]

    for_x = best(x_all, lambda s, z: error(x, quantize(x, s, z, bits)))
    for_w = [best(w_all[o], lambda s, z, o=o: error(w[:, o], quantize(w[:, o], s, z, bits))) for o in range(5)]
    errors = []
    for rounds in range(4):
        if rounds:
            x_hat = quantize(x, *for_x, bits)
            for_w = [
                best(w_all[o], lambda s, z, o=o, h=x_hat: error(exact[:, o], h @ quantize(w[:, o], s, z, bits)))
                for o in range(5)
            ]
            w_hat = np.stack([quantize(w[:, o], *for_w[o], bits) for o in range(5)], axis=1)
            for_x = best(x_all, lambda s, z, h=w_hat: error(exact, quantize(x, s, z, bits) @ h))
        qx, qw = linear_output_error(x, w, bits, bits, rounds=rounds, count=32)
        assert qx is not None
        np.testing.assert_allclose([qx.scale, qx.zero], for_x, rtol=1e-5)
        np.testing.assert_allclose(np.stack([qw.scale, qw.zero], 1), for_w, rtol=1e-5)
        errors.append(error(exact, np.asarray(qx(x), np.float64) @ np.asarray(qw(w), np.float64)))
    assert (np.diff(errors) <= 1e-6 * errors[0]).all() and errors[-1] < 0.95 * errors[0]


def test_linear_without_activations_and_with_more_axes():
    x, w = linear_problem()
    _, plain = linear_output_error(x, w, None, 3, count=32)
    qx, _ = linear_output_error(x, w, None, 3, count=32)
    assert qx is None and plain.scale.shape == (5,)
    exact = x.astype(np.float64) @ w
    for o in range(5):
        found = error(exact[:, o], x.astype(np.float64) @ quantize(w[:, o], plain.scale[o], plain.zero[o], 3))
        others = [
            error(exact[:, o], x.astype(np.float64) @ quantize(w[:, o], s, z, 3))
            for s, z in grid_candidates(w[:, o], 3, range(8), 4, floor=1e-8)
        ]
        assert found <= min(others) * CLOSE
    both = linear_output_error(x.reshape(4, 5, 3, 8), w, 3, 3, count=32)
    expected = linear_output_error(x, w, 3, 3, count=32)
    for got, want in zip(jax.tree.leaves(both), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, want)


def test_linear_layers_that_widen():
    """Errors by way of the weights' products, where there are more outputs than inputs: against all candidates."""
    x, _ = linear_problem()
    w = heavy(31, 8, 11)
    exact = x.astype(np.float64) @ w
    qx, qw = linear_output_error(x, w, 3, 3, rounds=1, count=32)
    assert qx is not None
    w_hat = np.stack([quantize(w[:, o], qw.scale[o], qw.zero[o], 3) for o in range(11)], axis=1)
    others = [error(exact, quantize(x, s, z, 3) @ w_hat) for s, z in grid_candidates(x, 3, range(8), 4)]
    assert error(exact, quantize(x, qx.scale, qx.zero, 3) @ w_hat) <= min(others) * CLOSE


def heads():
    """Queries and transposed keys of two heads, one of them with outliers."""
    q, k = heavy(11, 3, 2, 9, 4), heavy(12, 3, 2, 4, 7)
    q[:, 1] *= 4
    return q, k


def ends_of(x, points):
    x = x.astype(np.float64)
    (inner_low, inner_high), (low, high) = np.quantile(x, (0.01, 0.99)), np.quantile(x, (0.00001, 0.99999))
    share = np.arange(points) / points
    return inner_low + (low - inner_low) * share, inner_high + (high - inner_high) * share


def in_range(x, low, high, bits):
    scale = (high - low) / (2**bits - 1)
    return quantize(x, scale, np.round(-low / scale), bits)


def test_product_output_error_is_coordinate_descent():
    a, b = heads()
    bits, points = (3, 2), 8
    exact = np.einsum("bhnd,bhdm->bhnm", *(v.astype(np.float64) for v in (a, b)))
    errors = []
    for rounds in range(3):
        qa, qb = product_output_error(a, b, bits, rounds=rounds, points=points)
        assert qa.scale.shape == qb.zero.shape == (2, 1, 1) and (qa.bits, qb.bits) == bits
        for head in range(2):
            x, y, of = a[:, head], b[:, head], exact[:, head]

            def missed(x_hat, y_hat, of=of):
                return error(of, x_hat @ y_hat)

            (la, ha), (lb, hb) = ends_of(x, points), ends_of(y, points)
            i = np.argmin([missed(in_range(x, la[k], ha[k], 3), y.astype(np.float64)) for k in range(points)])
            at, x_hat = [la[i], ha[i]], in_range(x, la[i], ha[i], 3)
            j = np.argmin([missed(x_hat, in_range(y, lb[k], hb[k], 2)) for k in range(points)])
            of_b = [lb[j], hb[j]]
            for _ in range(rounds):
                y_hat = in_range(y, *of_b, 2)
                at[0] = min(la, key=lambda low: missed(in_range(x, low, at[1], 3), y_hat))
                at[1] = min(ha, key=lambda high: missed(in_range(x, at[0], high, 3), y_hat))
                x_hat = in_range(x, *at, 3)
                of_b[0] = min(lb, key=lambda low: missed(x_hat, in_range(y, low, of_b[1], 2)))
                of_b[1] = min(hb, key=lambda high: missed(x_hat, in_range(y, of_b[0], high, 2)))
            for q, (low, high) in ((qa, at), (qb, of_b)):
                scale = (high - low) / q.levels
                np.testing.assert_allclose(q.scale[head].item(), scale, rtol=1e-5)
                assert q.zero[head].item() == np.round(-low / scale)
        errors.append(
            np.mean((exact - np.asarray(qa(a), np.float64) @ np.asarray(qb(b), np.float64)) ** 2, (0, 2, 3))
        )
    assert (np.diff(errors, axis=0) <= 1e-6 * errors[0]).all() and errors[2].sum() < 0.99 * errors[0].sum()


def keys_of(q, k):
    return jnp.einsum("bhnd,bhmd->bhnm", q, k, precision="highest")


def test_heads_stand_alone_and_products_are_the_users():
    a, b = heads()
    both = product_output_error(a, b, 3, points=8, rounds=1)
    one = product_output_error(a[:, 1:], b[:, 1:], 3, points=8, rounds=1)
    other = product_output_error(a, b.swapaxes(2, 3), 3, points=8, rounds=1, product=keys_of)
    for got, alone, same in zip(*map(jax.tree.leaves, (both, one, other)), strict=True):
        np.testing.assert_allclose(got[1:], alone, rtol=1e-6)
        np.testing.assert_allclose(got, same, rtol=1e-6)


def test_bad_operands_are_named():
    x = heavy(14, 10, 4)
    bad = x.copy()
    bad[3, 2] = np.nan
    for call, words in [
        (lambda: linear_output_error(bad, x.T, 4, 4), "holds NaN"),
        (lambda: linear_output_error(x, x.T, 4, 0), "not 0"),
        (lambda: product_output_error(x, x[None], 4, axes=0), "do not have the same number of axes"),
    ]:
        with pytest.raises(JaxqError, match=words):
            call()
