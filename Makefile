# Each target sets up .venv by itself; a run can also use any other environment that has requirements.txt.
PYTHON ?= python3
RUN := runs/demo-$(shell date +%s)

.PHONY: demo test test-slurm stress lint sync speed opengl

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python >= 3.11 needed; try make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: .venv/installed  ## train HyAR-TD3 on Platform for a few minutes, then play 100 fresh episodes
	.venv/bin/python hyar_td3.py --env Platform-v0 --seed 4 --total-timesteps 32500 --capture-video --run-name $(notdir $(RUN))
	@echo "curve:      $(RUN)/learning_curve.png"
	@echo "video:      $$(ls $(RUN)/videos/*.mp4 | head -n 1)"
	@echo "run folder: $(RUN)"
	.venv/bin/python benchmark/evaluate.py $(RUN) --model best_model.pt --episodes 100 --at-least 0.9

opengl: .venv/installed  ## OpenGL, with which dm_control renders without a display
	@MUJOCO_GL=egl .venv/bin/python -c 'import mujoco; mujoco.GLContext(8, 8).make_current()' >/dev/null 2>&1 \
	|| { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get -qq update \
	&& apt-get -qq install -y --no-install-recommends libegl1 libgl1-mesa-dri >/dev/null; } \
	|| echo "no OpenGL, so tests of dm_control are skipped; install it (Debian: apt-get install libegl1 libgl1-mesa-dri)"

test: .venv/installed opengl  ## everything but the long learning runs
	.venv/bin/python -m pytest -q -n 2 --dist loadfile

test-slurm: .venv/installed  ## an array of trainings on a real SLURM of two nodes on this machine; installs it, as root
	.venv/bin/python -m pytest -q -m slow tests/test_slurm.py

stress: .venv/installed  ## kills, full disks, damaged checkpoints, malformed arguments; not in CI
	.venv/bin/python tests/stress.py --write benchmark/results/stress.md
	.venv/bin/python benchmark/tables.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python tests/texts.py lengths

sync: .venv/installed  ## copy texts that are the same in several scripts from their home into the others
	.venv/bin/python tests/texts.py sync

speed: .venv/installed  ## environment steps and updates per second, compared with a plain version and the roofline
	for script in hyar_td3 sac_ae_pixels plas_pixels pretrain_vae_moa world_model_test; do \
	.venv/bin/python benchmark/speed.py $$script --json benchmark/results/speed/$$script.json || exit 1; done
	.venv/bin/python benchmark/tables.py
