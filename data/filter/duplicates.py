"""Pictures that look alike, by perceptual hash and colours or by embeddings: who yields to whom.

A perceptual hash sees shapes and no hue, so two pictures are near when their hashes differ in few
bits *and* their miniatures differ little in colour. Nothing here is approximate but the clusters
of the embeddings: the search finds what comparing all pairs finds.

Shape letters: N pictures, R looks by rank, U distinct hashes, D numbers of a picture, M references.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image

from data import coco, executor
from data.schema import MINIATURE
from gigagan.common.pictures import UndecodableError, decode
from gigagan.common.progress import Progress, silent

HASH_BITS = 64
DENSE = 256
"""Buckets of more looks are compared only when one of theirs is kept."""
BLOCK = 1 << 21
"""Pairs whose colours are compared at once."""
ROUNDING = 1e-6
"""By which a cosine of equal vectors may miss 1."""
MAX_CLUSTERS = 10_000
"""Most clusters of embeddings."""
ROWS_A_CLUSTER = 128
"""Embeddings that a cluster is fitted on."""
ROWS = 8192
"""Embeddings in memory at once."""

Bands = tuple[tuple[int, int], ...]
"""Some bits of a hash, as ranges [low, high)."""


def fingerprint(image: Image.Image) -> tuple[int, bytes]:
    """Perceptual hash (64 bits) and miniature (4×4 px, RGB) of a decoded picture."""
    small = image.copy()
    small.thumbnail((256, 256))
    miniature = small.resize((MINIATURE, MINIATURE), Image.Resampling.BOX).tobytes()
    return int(str(imagehash.phash(small)), 16), miniature


def ranking(area_N: np.ndarray) -> np.ndarray:
    """Pictures by their right to stay: larger area first, then smaller index, as keys ascend."""
    return np.lexsort((np.arange(len(area_N)), -area_N))


def near_duplicates(
    phash_N: np.ndarray,
    miniature_ND: np.ndarray,
    area_N: np.ndarray,
    max_bits: int,
    max_colour: float,
) -> np.ndarray:
    """Index of the picture that each one yields to, −1 for those that stay.

    Greedy by `ranking`: a picture yields to the first one *that stays* and is near: at most
    `max_bits` of 64 hash bits and on average `max_colour` of 255 apart. So one that went takes no
    other with it, and chains of small changes do not collapse.

    How it scales. Equal looks are grouped first. Two hashes at most d bits apart agree wholly in t
    of d + t bands (pigeonhole), so they share a bucket in one of C(d + t, t) tables, each one sort;
    t is chosen so that buckets hold few pictures by chance. Buckets that are dense nevertheless are
    searched only for pictures that stay, which in a dense bucket are few. A million pictures take
    seconds at 4 bits, and half a minute at 8 (`python -m bench data_select`). Some 300 bytes a
    picture are in memory: 100 million fit a machine of 32 GB. More do not: for those the tables
    would have to be sorted outside memory, and near pairs joined partition by partition, which
    this does not do. Quadratic it stays for many pictures of about one hash, none near another in
    colour.
    """
    if not len(area_N):
        return np.empty(0, np.int64)
    order_N = ranking(area_N)
    hash_N, small_ND = phash_N[order_N], np.ascontiguousarray(miniature_ND[order_N])
    first_N = _first_equal(hash_N, small_ND)
    looks_R = np.flatnonzero(first_N == np.arange(len(first_N)))
    keeper_R = _Search(hash_N[looks_R], small_ND[looks_R], max_bits, max_colour).run()
    keeper_R = np.where(keeper_R < 0, np.arange(len(looks_R)), keeper_R)
    stays_N = looks_R[keeper_R[np.searchsorted(looks_R, first_N)]]
    yields = stays_N != np.arange(len(stays_N))
    result_N = np.full(len(stays_N), -1, np.int64)
    result_N[order_N[yields]] = order_N[stays_N[yields]]
    return result_N


def _first_equal(hash_N: np.ndarray, small_ND: np.ndarray) -> np.ndarray:
    """Place of the first picture of equal hash and miniature.

    Grouped by a digest and then compared. Two looks of one digest are left apart, as if they were
    unequal, which costs time and never a result.
    """
    words_NW = small_ND.view(np.uint64)
    digest_N = hash_N.astype(np.uint64)
    for word_N in words_NW.T:
        digest_N = (digest_N ^ (digest_N >> np.uint64(29)) ^ word_N) * np.uint64(0x9E3779B97F4A7C15)
    _, index, inverse = np.unique(digest_N, return_index=True, return_inverse=True)
    first_N = index[inverse]
    equal = (hash_N == hash_N[first_N]) & (words_NW == words_NW[first_N]).all(1)
    return np.where(equal, first_N, np.arange(len(hash_N)))


def _tables(num_left: int, num_right: int, limit: int) -> list[Bands]:
    """The cheapest set of bit ranges so that hashes within `limit` bits agree in one of them."""

    def cost(agreeing: int) -> float:
        pairs = num_left * num_right / 2 ** (HASH_BITS * agreeing // (limit + agreeing))
        return comb(limit + agreeing, agreeing) * (10 * (num_left + num_right) + pairs)

    agreeing = min(range(1, max(limit, 1) + 1), key=cost)  # a key of more than 32 bits never pays
    edges = [HASH_BITS * band // (limit + agreeing) for band in range(limit + agreeing + 1)]
    return list(combinations(pairwise(edges), agreeing))


def _keys(hash_U: np.ndarray, bands: Bands) -> np.ndarray:
    """The bits of the bands, side by side."""
    key_U = np.zeros(len(hash_U), np.uint64)
    for low, high in bands:
        band_U = hash_U >> np.uint64(low) & np.uint64((1 << high - low) - 1)
        key_U = key_U << np.uint64(high - low) | band_U
    return key_U


def _agree_earlier(difference_P: np.ndarray, table: Bands, tables: list[Bands]) -> np.ndarray:
    """Whether each pair also agrees in a band before those of `table`, so that another finds it."""
    bands = {band for other in tables for band in other}
    found = np.zeros(len(difference_P), bool)
    for low, high in bands.difference(table):
        if low < table[-1][0]:
            found |= difference_P & np.uint64((1 << high) - (1 << low)) == 0
    return found


def _ranges(start_K: np.ndarray, size_K: np.ndarray) -> np.ndarray:
    """start, start + 1, … of each range, one after the other."""
    end_K = np.cumsum(size_K)
    total = int(end_K[-1]) if len(end_K) else 0
    return np.arange(total) + np.repeat(start_K - end_K + size_K, size_K)


def _chunks(size_K: np.ndarray) -> Iterator[slice]:
    """Runs of items whose sizes are about BLOCK together."""
    block_K = np.cumsum(size_K) // BLOCK
    edges = [0, *(np.flatnonzero(np.diff(block_K)) + 1).tolist(), len(size_K)]
    return (slice(start, stop) for start, stop in pairwise(edges))


class _Search:
    """The greedy choice among looks that are given by rank, the first to stay first.

    A look is meant by its rank, a hash by its number: its place in `hash_U`, which ascends. A table
    sorts the numbers into buckets of hashes that agree in some bits.
    """

    def __init__(
        self, hash_R: np.ndarray, miniature_RD: np.ndarray, limit: int, max_colour: float
    ) -> None:
        self.miniature_RD, self.limit, self.max_colour = miniature_RD, limit, max_colour
        self.channel_sum_RC = miniature_RD.reshape(len(miniature_RD), -1, 3).sum(1, dtype=np.int32)
        self.hash_U, self.number_R = np.unique(hash_R, return_inverse=True)
        # Ranks in the order of their hashes: a hash has `num_looks_U` from `first_look_U` on.
        self.by_hash_R = np.argsort(self.number_R, kind="stable")
        self.num_looks_U = np.bincount(self.number_R, minlength=len(self.hash_U))
        self.first_look_U = np.cumsum(self.num_looks_U) - self.num_looks_U
        self.tables = _tables(len(self.hash_U), len(self.hash_U), limit) if limit else []
        self.is_dense_U = self.num_looks_U > DENSE
        self.dense_buckets: dict[tuple[int, int], np.ndarray] = {}
        """Table and key → numbers of the hashes in a bucket that is searched only when asked."""
        self.reached: dict[int, np.ndarray] = {}
        """What `_reachable` found for hashes of several looks, which are asked for again."""

    def run(self) -> np.ndarray:
        """Rank of the look that each one yields to, or −1."""
        left_P, right_P = self._pairs_outside_dense_buckets()
        keeper_R = np.full(len(self.number_R), -1, np.int64)
        visited = np.union1d(left_P, np.flatnonzero(self.is_dense_U[self.number_R]))
        starts = np.searchsorted(left_P, visited).tolist()
        stops = np.searchsorted(left_P, visited, "right").tolist()
        dense = self.is_dense_U[self.number_R[visited]].tolist()
        for rank, start, stop, is_dense in zip(visited.tolist(), starts, stops, dense, strict=True):
            if keeper_R[rank] >= 0:
                continue
            later = right_P[start:stop]
            keeper_R[later[keeper_R[later] < 0]] = rank
            if is_dense:
                keeper_R[self._open_near(rank, keeper_R)] = rank
        return keeper_R

    def _pairs_outside_dense_buckets(self) -> tuple[np.ndarray, np.ndarray]:
        """Near pairs (rank, greater rank) of all buckets but dense ones, sorted by the first."""
        several = np.flatnonzero((self.num_looks_U > 1) & (self.num_looks_U <= DENSE))
        found = [self._pairs_of_looks(several, several)]
        for number in range(len(self.tables)):
            found.append(self._pairs_of_looks(*self._pairs_of_hashes(number)))
        left_P, right_P = (np.concatenate(side) for side in zip(*found, strict=True))
        order_P = np.argsort(left_P, kind="stable")
        return left_P[order_P], right_P[order_P]

    def _pairs_of_hashes(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Near pairs of hashes that this table is the first to find; notes its dense buckets."""
        table = self.tables[number]
        # One sort of key and number, packed into a word, makes buckets of equal keys.
        all_U = np.arange(len(self.hash_U), dtype=np.uint64)
        packed_U = np.sort(_keys(self.hash_U, table) << np.uint64(32) | all_U)
        key_U = packed_U >> np.uint64(32)
        number_U = (packed_U & np.uint64(2**32 - 1)).astype(np.intp)
        start_B = np.flatnonzero(np.r_[True, key_U[1:] != key_U[:-1]])
        size_B = np.diff(np.r_[start_B, len(key_U)])
        is_dense_B = (np.add.reduceat(self.num_looks_U[number_U], start_B) > DENSE) & (size_B > 1)
        dense = start_B[is_dense_B].tolist(), size_B[is_dense_B].tolist()
        for start, size in zip(*dense, strict=True):
            bucket = number_U[start : start + size]
            self.dense_buckets[number, int(key_U[start])] = bucket
            self.is_dense_U[bucket] = True
        left, right = self._pairs_in_buckets(number_U, start_B, np.where(is_dense_B, 1, size_B))
        earlier = _agree_earlier(self.hash_U[left] ^ self.hash_U[right], table, self.tables)
        return left[~earlier], right[~earlier]

    def _pairs_in_buckets(
        self, number_U: np.ndarray, start_B: np.ndarray, size_B: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Near pairs inside of buckets: each hash with the next, with the one after it, …"""
        bits_U = self.hash_U[number_U]
        place_U = np.arange(len(bits_U))
        end_U = np.repeat(start_B + size_B, np.diff(np.r_[start_B, len(bits_U)]))
        num_after_U = end_U - place_U - 1  # hashes of its bucket that come after each
        found = [np.empty((2, 0), np.intp)]
        for shift in range(1, int(size_B.max(initial=1))):
            if len(place_U) * 8 > len(bits_U):  # cheaper to compare all than to pick
                near = np.bitwise_count(bits_U[shift:] ^ bits_U[:-shift]) <= self.limit
                near_P = np.flatnonzero(near)
                near_P = near_P[num_after_U[near_P] >= shift]
                place_U = place_U if shift % 4 else np.flatnonzero(num_after_U > shift)
            else:
                place_U = place_U[num_after_U[place_U] >= shift]
                near = np.bitwise_count(bits_U[place_U] ^ bits_U[place_U + shift]) <= self.limit
                near_P = place_U[near]
            found.append(np.stack([number_U[near_P], number_U[near_P + shift]]))
        left, right = np.concatenate(found, 1)
        return left, right

    def _pairs_of_looks(
        self, left_P: np.ndarray, right_P: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of looks (rank, greater rank) of these pairs of hashes that are near in colour."""
        found = [np.empty((2, 0), np.intp)]
        size_P = self.num_looks_U[left_P] * self.num_looks_U[right_P]
        for chunk in _chunks(size_P):
            # Every look of the left hash with every one of the right hash.
            pair = np.repeat(np.arange(chunk.start, chunk.stop), size_P[chunk])
            of_pair = _ranges(np.zeros_like(size_P[chunk]), size_P[chunk])
            of_left, of_right = np.divmod(of_pair, self.num_looks_U[right_P[pair]])
            left = self.by_hash_R[self.first_look_U[left_P[pair]] + of_left]
            right = self.by_hash_R[self.first_look_U[right_P[pair]] + of_right]
            is_once = (left_P[pair] != right_P[pair]) | (of_left < of_right)
            left, right = left[is_once], right[is_once]
            near = self._near_colours(left, right)
            found.append(np.sort(np.stack([left[near], right[near]]), 0))
        left, right = np.concatenate(found, 1)
        return left, right

    def _near_colours(self, left: np.ndarray | int, right: np.ndarray) -> np.ndarray:
        """Whether the miniatures are near: sums over each channel, which are cheap, go first."""
        budget = self.max_colour * self.miniature_RD.shape[1]
        near = np.abs(self.channel_sum_RC[left] - self.channel_sum_RC[right]).sum(1) <= budget
        left = left[near] if isinstance(left, np.ndarray) else left
        apart = _colours_apart(self.miniature_RD[left], self.miniature_RD[right[near]])
        near[near] = apart <= self.max_colour
        return near

    def _open_near(self, rank: int, keeper_R: np.ndarray) -> np.ndarray:
        """Looks near to this one that come later and yield to nobody yet."""
        numbers = self._reachable(int(self.number_R[rank]))
        ranks = self.by_hash_R[_ranges(self.first_look_U[numbers], self.num_looks_U[numbers])]
        ranks = ranks[(ranks > rank) & (keeper_R[ranks] < 0)]
        return ranks[self._near_colours(rank, ranks)]

    def _reachable(self, number: int) -> np.ndarray:
        """Numbers of this hash and of those near to it in the dense buckets that it is in."""
        if (known := self.reached.get(number)) is not None:
            return known
        bits_1 = self.hash_U[number : number + 1]
        found = [np.array([number])]
        for of_table, table in enumerate(self.tables):
            bucket = self.dense_buckets.get((of_table, int(_keys(bits_1, table)[0])))
            if bucket is not None:
                found.append(bucket[np.bitwise_count(self.hash_U[bucket] ^ bits_1) <= self.limit])
        numbers = np.unique(np.concatenate(found))
        if self.num_looks_U[number] > 1:
            self.reached[number] = numbers
        return numbers


def _colours_apart(left_PD: np.ndarray, right_PD: np.ndarray) -> np.ndarray:
    """Mean absolute difference of miniatures, of 255."""
    return np.abs(left_PD.astype(np.int16) - right_PD).mean(-1)


@dataclass(frozen=True)
class References:
    """Looks of the pictures that training must not see."""

    paths: list[Path]
    phash_M: np.ndarray
    miniature_MD: np.ndarray


def references(
    files: Sequence[str], *, workers: int = 1, progress: Progress = silent
) -> References:
    """Looks of all pictures of captions files in COCO's format, decoded by local processes.

    Raises:
        ValueError: a file is in another format, or one of its pictures is absent or undecodable.
    """
    paths = list(dict.fromkeys(path for file in files for path in coco.read(Path(file)).paths))
    looks: dict[Path, tuple[int, bytes]] = {}
    for path, found in executor.each(_look, paths, workers=workers):
        if isinstance(found, str):
            raise ValueError(
                f"filter.decontaminate: {path} cannot be decoded ({found}), so nothing can be "
                "compared with it: mend the file or take it off its captions file"
            )
        looks[path] = found
        progress("looking at evaluation pictures", len(looks), len(paths))
    phash_M = np.array([looks[path][0] for path in paths], np.uint64)
    miniatures = b"".join(looks[path][1] for path in paths)
    miniature_MD = np.frombuffer(miniatures, np.uint8).reshape(-1, 3 * MINIATURE**2)
    return References(paths, phash_M, miniature_MD)


def _look(path: Path) -> tuple[int, bytes] | str:
    """Fingerprint of a file, or why it has none."""
    try:
        return fingerprint(decode(path.read_bytes()))
    except UndecodableError as error:
        return str(error)


def contaminated(
    phash_N: np.ndarray,
    miniature_ND: np.ndarray,
    known: References,
    max_bits: int,
    max_colour: float,
) -> np.ndarray:
    """Index of a reference that each picture is near to, or −1. Pictures may come in blocks."""
    found_N = np.full(len(phash_N), -1, np.int64)
    for table in _tables(len(phash_N), len(known.paths), max_bits):
        key_M = _keys(known.phash_M, table)
        order_M = np.argsort(key_M, kind="stable")
        open_K = np.flatnonzero(found_N < 0)
        key_K = _keys(phash_N[open_K], table)
        at_K = np.searchsorted(key_M, key_K, sorter=order_M)
        end_K = np.searchsorted(key_M, key_K, "right", sorter=order_M)
        while len(going := np.flatnonzero((at_K < end_K) & (found_N[open_K] < 0))):
            open_K, at_K, end_K = open_K[going], at_K[going], end_K[going]
            reference_K = order_M[at_K]
            near = np.bitwise_count(phash_N[open_K] ^ known.phash_M[reference_K]) <= max_bits
            near[near] = max_colour >= _colours_apart(
                miniature_ND[open_K[near]], known.miniature_MD[reference_K[near]]
            )
            found_N[open_K[near]] = reference_K[near]
            at_K = at_K + 1
    return found_N


def embedding_duplicates(
    features_ND: np.ndarray,
    area_N: np.ndarray,
    min_cosine: float,
    *,
    num_clusters: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> np.ndarray:
    """Index of the picture of its cluster that each one yields to, −1 for those that stay.

    SemDeDup (Abbas et al. 2023): only pictures of one k-means cluster are compared, by default of
    √N clusters, so the work grows as N^1.5. Near pairs that a border parts are missed; within a
    cluster nothing is. Who stays is `ranking`'s choice, greedily, as in `near_duplicates`.
    `features_ND` is read in blocks and may be a memory map of any float type.
    """
    if not len(area_N):
        return np.empty(0, np.int64)
    label_N = _clusters(features_ND, num_clusters, seed, progress)
    result_N = np.full(len(label_N), -1, np.int64)
    order_N = ranking(area_N)
    by_cluster_N = order_N[np.argsort(label_N[order_N], kind="stable")]
    sizes = np.bincount(label_N)
    done = 0
    for members in np.split(by_cluster_N, np.cumsum(sizes)[:-1]):
        keeper = _greedy_cosine(features_ND, members, min_cosine)
        result_N[members[keeper >= 0]] = members[keeper[keeper >= 0]]
        done += len(members)
        progress("comparing embeddings", done, len(label_N))
    return result_N


def _unit(features_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1 in float32; zeros stay, and are near to nothing."""
    features_ND = np.asarray(features_ND, np.float32)
    return features_ND / np.maximum(np.linalg.norm(features_ND, axis=1, keepdims=True), 1e-12)


def _clusters(
    features_ND: np.ndarray, num_clusters: int | None, seed: int, progress: Progress
) -> np.ndarray:
    """Cluster of each row: k-means fitted on a seeded sample."""
    from sklearn.cluster import MiniBatchKMeans

    num_rows = len(features_ND)
    wanted = num_clusters or min(round(num_rows**0.5), MAX_CLUSTERS)
    if wanted <= 1:
        return np.zeros(num_rows, np.int64)
    rng = np.random.default_rng(seed)
    sample = np.sort(rng.choice(num_rows, min(num_rows, ROWS_A_CLUSTER * wanted), replace=False))
    progress("clustering embeddings", 0, num_rows)
    model = MiniBatchKMeans(wanted, random_state=seed, batch_size=4096, n_init=1, max_iter=20)
    model.fit(_unit(features_ND[sample]))
    label_N = np.empty(num_rows, np.int64)
    for start in range(0, num_rows, ROWS):
        label_N[start : start + ROWS] = model.predict(_unit(features_ND[start : start + ROWS]))
        progress("clustering embeddings", min(start + ROWS, num_rows), num_rows)
    return label_N


def _greedy_cosine(
    features_ND: np.ndarray, members: np.ndarray, min_cosine: float, block: int = 1024
) -> np.ndarray:
    """Place in `members` of the one that each yields to, or −1; they come by rank."""
    keeper = np.full(len(members), -1, np.int64)
    for start in range(0, len(members), block):
        stop = min(start + block, len(members))
        rows = _unit(features_ND[members[start:stop]])
        for before in range(0, start, block):
            staying = before + np.flatnonzero(keeper[before : before + block] < 0)
            if not len(staying):
                continue
            near = rows @ _unit(features_ND[members[staying]]).T >= min_cosine - ROUNDING
            hit = np.flatnonzero(near.any(1) & (keeper[start:stop] < 0))
            keeper[start + hit] = staying[near[hit].argmax(1)]
        near = rows @ rows.T >= min_cosine - ROUNDING
        for place in np.flatnonzero(near.sum(1) > 1).tolist():
            if keeper[start + place] < 0:
                later = place + 1 + np.flatnonzero(near[place, place + 1 :])
                later = start + later[keeper[start + later] < 0]
                keeper[later] = start + place
    return keeper
