"""Files and folders of slow tests."""

# What `make unit` leaves out: browsers, several processes, whole runs. One slow test in a quick file is marked there.
SLOW = (
    "browser/",
    "experiments/test_adapted_students.py",
    "experiments/test_map_search.py",
    "experiments/test_map_study.py",
    "experiments/test_measured.py",
    "experiments/test_on_policy_runs.py",
    "experiments/test_resume.py",
    "experiments/test_run_cached.py",
    "experiments/test_run_experiment.py",
    "experiments/test_run_packed.py",
    "experiments/test_students.py",
    "experiments/test_study.py",
    "figures/test_every_figure.py",
    "planner/",
    "scale/",
    "house/test_benchmarks.py",
    "house/test_install.py",
    "teaching/test_notebooks_runner.py",
    "training/test_teacher_cache.py",
    "training/test_teacher_cache_published.py",
    "training/test_teacher_cache_top_k.py",
    "training/test_trainer_checkpoints.py",
    "widgets/test_planner.py",
)
