"""What a node tells its workers to drop, they drop, and live on."""

from __future__ import annotations

import numpy as np

from qjam import DataSet, Master


def total(params, part):
    return float(np.sum(part))


def test_a_worker_lives_on_when_slices_in_a_users_file_are_released(tmp_path):
    np.save(tmp_path / "data.npy", np.ones((4000, 20)))
    with Master(1, echo=False) as master:
        before = master.workers[0].pid
        for _ in range(3):
            data = DataSet(np.load(tmp_path / "data.npy", mmap_mode="r"), slice_size=1000)
            assert master.run(total, None, data) == 80_000.0
            data.release()
        assert master.run(total, None, [np.ones(3)]) == 3.0
        assert master.workers[0].pid == before
