//! Which rank a process is, by the variables of each launcher.

use candle_moe::ep::{Environment, Launcher, Overrides, ProcsConfig};

type Variables = &'static [(&'static str, &'static str)];

const TORCHRUN: Variables = &[
    ("RANK", "3"),
    ("WORLD_SIZE", "4"),
    ("LOCAL_RANK", "1"),
    ("MASTER_ADDR", "10.0.0.1"),
    ("MASTER_PORT", "29500"),
    ("TORCHELASTIC_RESTART_COUNT", "2"),
];
const SLURM: Variables = &[
    ("SLURM_PROCID", "5"),
    ("SLURM_NTASKS", "8"),
    ("SLURM_LOCALID", "1"),
    ("SLURM_JOB_NODELIST", "node[003-005,010],login"),
    ("SLURM_LAUNCH_NODE_IPADDR", "10.0.0.9"),
    ("SLURM_JOB_ID", "1234567"),
];
const OPEN_MPI: Variables = &[
    ("OMPI_COMM_WORLD_RANK", "0"),
    ("OMPI_COMM_WORLD_SIZE", "2"),
    ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
    ("MASTER_ADDR", "localhost"),
    ("MASTER_PORT", "4000"),
];

fn detect(overrides: &Overrides, variables: &[(&str, &str)]) -> candle_core::Result<Option<Environment>> {
    // The last one counts, so that tests can replace a variable; an empty one is not set.
    let lookup = |name: &str| variables.iter().rfind(|(n, _)| *n == name).map(|(_, value)| value.to_string());
    Environment::from_lookup(overrides, lookup)
}

fn with(base: Variables, more: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
    [base, more].concat()
}

fn environment(launcher: Launcher, ranks: [usize; 3], address: &str, port: u16, generation: u64) -> Environment {
    let [rank, world_size, local_rank] = ranks;
    Environment { launcher, rank, world_size, local_rank, address: address.into(), port, generation }
}

#[test]
fn each_launcher_is_understood() {
    use Launcher::{OpenMpi, Slurm, Torchrun};
    let both = with(TORCHRUN, SLURM);
    let all = with(both.leak(), &[("OMPI_COMM_WORLD_RANK", "3"), ("OMPI_COMM_WORLD_SIZE", "4")]);
    let all = with(all.leak(), &[("OMPI_COMM_WORLD_LOCAL_RANK", "1")]);
    for (variables, expected) in [
        (TORCHRUN.to_vec(), environment(Torchrun, [3, 4, 1], "10.0.0.1", 29500, 2)),
        (with(TORCHRUN, &[("TORCHELASTIC_RESTART_COUNT", "")]), environment(Torchrun, [3, 4, 1], "10.0.0.1", 29500, 0)),
        // torchrun's agent has the port itself.
        (
            with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", "True")]),
            environment(Torchrun, [3, 4, 1], "10.0.0.1", 29501, 2),
        ),
        (
            with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_PORT", "45999")]),
            environment(Torchrun, [3, 4, 1], "10.0.0.1", 26000, 2),
        ),
        (
            with(TORCHRUN, &[("TORCHELASTIC_USE_AGENT_STORE", "False")]),
            environment(Torchrun, [3, 4, 1], "10.0.0.1", 29500, 2),
        ),
        (
            with(OPEN_MPI, &[("TORCHELASTIC_USE_AGENT_STORE", "True")]),
            environment(OpenMpi, [0, 2, 0], "localhost", 4000, 0),
        ),
        // torchrun that srun has started numbers its ranks as it likes.
        (with(TORCHRUN, SLURM), environment(Torchrun, [3, 4, 1], "10.0.0.1", 29500, 2)),
        (all, environment(Torchrun, [3, 4, 1], "10.0.0.1", 29500, 2)),
        (SLURM.to_vec(), environment(Slurm, [5, 8, 1], "node003", 24567, 0)),
        (with(SLURM, &[("SLURM_JOB_NODELIST", "a,b")]), environment(Slurm, [5, 8, 1], "a", 24567, 0)),
        (with(SLURM, &[("SLURM_JOB_NODELIST", "gpu-7")]), environment(Slurm, [5, 8, 1], "gpu-7", 24567, 0)),
        (with(SLURM, &[("SLURM_JOB_NODELIST", "n[9,11-12]-ib,m")]), environment(Slurm, [5, 8, 1], "n9-ib", 24567, 0)),
        (with(SLURM, &[("SLURM_JOB_NODELIST", "")]), environment(Slurm, [5, 8, 1], "10.0.0.9", 24567, 0)),
        (with(SLURM, &[("MASTER_ADDR", "head"), ("MASTER_PORT", "77")]), environment(Slurm, [5, 8, 1], "head", 77, 0)),
        (OPEN_MPI.to_vec(), environment(OpenMpi, [0, 2, 0], "localhost", 4000, 0)),
        // A batch script of Slurm is no rank, and what it starts with mpirun is.
        (
            with(OPEN_MPI, &[("SLURM_NTASKS", "2"), ("SLURM_JOB_ID", "3")]),
            environment(OpenMpi, [0, 2, 0], "localhost", 4000, 0),
        ),
    ] {
        assert_eq!(detect(&Overrides::default(), &variables).unwrap().unwrap(), expected, "{variables:?}");
    }
}

#[test]
fn without_a_launcher_there_is_no_rank() {
    let nobody: [Variables; 4] = [
        &[],
        &[("MASTER_ADDR", "localhost"), ("MASTER_PORT", "1")],
        &[("SLURM_NTASKS", "4"), ("SLURM_JOB_ID", "1")],
        &[("RANK", ""), ("WORLD_SIZE", "")],
    ];
    for variables in nobody {
        assert_eq!(detect(&Overrides::default(), variables).unwrap(), None, "{variables:?}");
    }
}

#[test]
fn explicit_configuration_wins() {
    let overrides = Overrides {
        rank: Some(1),
        world_size: Some(2),
        local_rank: Some(0),
        address: Some("here".into()),
        port: Some(9),
        generation: Some(7),
    };
    let explicit = environment(Launcher::Explicit, [1, 2, 0], "here", 9, 7);
    for variables in [&[], TORCHRUN, SLURM, OPEN_MPI, &[("RANK", "x")]] {
        assert_eq!(detect(&overrides, variables).unwrap().unwrap(), explicit);
    }
    // One by one, too.
    let some = Overrides { port: Some(9), generation: Some(5), ..Overrides::default() };
    let expected = environment(Launcher::Torchrun, [3, 4, 1], "10.0.0.1", 9, 5);
    assert_eq!(detect(&some, TORCHRUN).unwrap().unwrap(), expected);
    let ranks = Overrides { rank: Some(0), world_size: Some(3), ..Overrides::default() };
    let expected = environment(Launcher::Explicit, [0, 3, 0], "localhost", 4000, 0);
    assert_eq!(detect(&ranks, OPEN_MPI).unwrap().unwrap(), expected);

    let config = ProcsConfig::from(&explicit);
    assert_eq!((config.rank, config.world_size, config.port, config.generation), (1, 2, 9, 7));
}

#[test]
fn what_is_half_set_or_contradictory_is_named() {
    let torchrun = |more| with(TORCHRUN, more);
    let slurm = |more| with(SLURM, more);
    let mpi = |more| with(OPEN_MPI, more);
    for (variables, words) in [
        (torchrun(&[("WORLD_SIZE", "")]), &["WORLD_SIZE is not set", "RANK is \"3\"", "torchrun"][..]),
        (torchrun(&[("RANK", "")]), &["RANK is not set", "WORLD_SIZE is \"4\"", "unset all of"]),
        (torchrun(&[("LOCAL_RANK", "")]), &["LOCAL_RANK is not set", "RANK is \"3\""]),
        (torchrun(&[("RANK", "-1")]), &["RANK is \"-1\"", "number", "unset"]),
        (torchrun(&[("WORLD_SIZE", "four")]), &["WORLD_SIZE is \"four\"", "number"]),
        (torchrun(&[("RANK", "4")]), &["RANK is 4", "less than WORLD_SIZE, which is 4"]),
        (torchrun(&[("RANK", "0"), ("WORLD_SIZE", "0")]), &["WORLD_SIZE is 0", "at least 1"]),
        (torchrun(&[("LOCAL_RANK", "9")]), &["LOCAL_RANK is 9", "WORLD_SIZE"]),
        (torchrun(&[("MASTER_ADDR", "")]), &["MASTER_ADDR is not set", "127.0.0.1"]),
        (torchrun(&[("MASTER_PORT", "")]), &["MASTER_PORT is not set", "torchrun", "free port"]),
        (torchrun(&[("MASTER_PORT", "0")]), &["MASTER_PORT is 0", "1 to 65535"]),
        (torchrun(&[("MASTER_PORT", "65536")]), &["MASTER_PORT is 65536", "1 to 65535"]),
        (torchrun(&[("MASTER_PORT", "http")]), &["MASTER_PORT is \"http\"", "number"]),
        (torchrun(&[("TORCHELASTIC_RESTART_COUNT", "x")]), &["TORCHELASTIC_RESTART_COUNT is \"x\""]),
        (with(TORCHRUN, OPEN_MPI), &["RANK is 3", "OMPI_COMM_WORLD_RANK is 0", "unset"]),
        (
            torchrun(&[
                ("OMPI_COMM_WORLD_RANK", "3"),
                ("OMPI_COMM_WORLD_SIZE", "8"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
            ]),
            &["WORLD_SIZE is 4", "OMPI_COMM_WORLD_SIZE is 8", "unset"],
        ),
        (slurm(&[("SLURM_NTASKS", "")]), &["SLURM_NTASKS is not set", "SLURM_PROCID is \"5\"", "Slurm"]),
        (slurm(&[("SLURM_LOCALID", "")]), &["SLURM_LOCALID is not set"]),
        (slurm(&[("SLURM_PROCID", "8")]), &["SLURM_PROCID is 8", "SLURM_NTASKS, which is 8"]),
        (slurm(&[("SLURM_JOB_NODELIST", "[")]), &["SLURM_JOB_NODELIST is \"[\"", "MASTER_ADDR"]),
        (slurm(&[("SLURM_JOB_NODELIST", ",a")]), &["SLURM_JOB_NODELIST is \",a\""]),
        (
            slurm(&[("SLURM_JOB_NODELIST", ""), ("SLURM_LAUNCH_NODE_IPADDR", "")]),
            &["SLURM_JOB_NODELIST", "SLURM_LAUNCH_NODE_IPADDR", "srun", "MASTER_ADDR"],
        ),
        (slurm(&[("SLURM_JOB_ID", "")]), &["SLURM_JOB_ID is not set", "MASTER_PORT"]),
        (slurm(&[("SLURM_JOB_ID", "j")]), &["SLURM_JOB_ID is \"j\""]),
        (mpi(&[("OMPI_COMM_WORLD_SIZE", "")]), &["OMPI_COMM_WORLD_SIZE is not set", "OpenMPI"]),
        (mpi(&[("OMPI_COMM_WORLD_RANK", "2")]), &["OMPI_COMM_WORLD_RANK is 2"]),
        (mpi(&[("MASTER_ADDR", "")]), &["MASTER_ADDR is not set", "mpirun -x MASTER_ADDR"]),
        (mpi(&[("MASTER_PORT", "")]), &["MASTER_PORT is not set", "OpenMPI"]),
    ] {
        let error = detect(&Overrides::default(), &variables).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{word:?} is missing in {error:?}");
        }
    }
    let rank = Overrides { rank: Some(1), ..Overrides::default() };
    let size = Overrides { world_size: Some(2), ..Overrides::default() };
    let out = Overrides { world_size: Some(1), ..rank.clone() };
    let alone = Overrides { world_size: Some(2), ..rank.clone() };
    let no_port = Overrides { address: Some("a".into()), ..alone.clone() };
    let zero = Overrides { port: Some(0), ..no_port.clone() };
    for (overrides, word) in [
        (rank, "rank 1 was configured without world_size"),
        (size, "world_size 2 was configured without rank"),
        (out, "rank is 1"),
        (alone, "address of rank 0 is not configured"),
        (no_port, "MASTER_PORT is not set"),
        (zero, "port of rank 0 is 0"),
    ] {
        let error = detect(&overrides, &[]).unwrap_err().to_string();
        assert!(error.contains(word), "{word:?} is missing in {error:?}");
    }
}
