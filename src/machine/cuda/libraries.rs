//! Libraries of CUDA as files: where they are looked for, and which of those that are found can be used with the
//! driver. What is called in them is presence.rs's.

use super::presence::show_version;
use std::ffi::{CStr, CString, c_void};
use std::iter::{once, once_with};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

/// A library and what is called in it.
pub struct Library {
    pub stem: &'static str,
    pub symbols: &'static [&'static str],
}

/// A library that is loaded.
#[derive(Clone, Copy)]
pub struct Handle(*mut c_void);

// SAFETY: the loader locks; a handle is only asked for addresses.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Handle {
    /// A name for the loader to look for, or a path. What one library calls by a name is never another's: two
    /// releases of one may be loaded.
    fn open(path: &Path) -> Result<Handle, String> {
        let c_path =
            CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: the path ends with a zero; NVIDIA's libraries may be loaded at any time.
        let handle = unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if !handle.is_null() {
            return Ok(Handle(handle));
        }
        // SAFETY: the loader's own string, which ends with a zero, or null.
        let why = unsafe {
            let why = libc::dlerror();
            (!why.is_null()).then(|| CStr::from_ptr(why).to_string_lossy().into_owned())
        };
        Err(why.unwrap_or_else(|| "the loader does not say why".to_owned()))
    }

    fn address(self, symbol: &str) -> Option<*mut c_void> {
        let symbol = CString::new(symbol).ok()?;
        // SAFETY: the library is open; the name ends with a zero.
        let address = unsafe { libc::dlsym(self.0, symbol.as_ptr()) };
        (!address.is_null()).then_some(address)
    }

    /// A function of the library as a pointer of type `F`.
    /// # Safety
    /// `F` is the function's type; it is not called once the library is closed.
    pub unsafe fn function<F: Copy>(self, symbol: &str) -> Option<F> {
        assert_eq!(size_of::<F>(), size_of::<*mut c_void>(), "a pointer");
        let address = self.address(symbol)?;
        // SAFETY: of one size; the caller's for the rest.
        Some(unsafe { std::mem::transmute_copy(&address) })
    }

    /// The file that has this function.
    fn file_of(self, symbol: &str) -> Option<String> {
        let address = self.address(symbol)?;
        // SAFETY: all zeros are a value of it.
        let mut facts: libc::Dl_info = unsafe { std::mem::zeroed() };
        // SAFETY: the facts are live; the loader writes the address of a string of its own that ends with a zero.
        unsafe {
            let found = libc::dladdr(address, &mut facts) != 0 && !facts.dli_fname.is_null();
            found.then(|| {
                CStr::from_ptr(facts.dli_fname)
                    .to_string_lossy()
                    .into_owned()
            })
        }
    }

    fn close(self) {
        // SAFETY: opened once, and nothing of it is kept.
        let _ = unsafe { libc::dlclose(self.0) };
    }
}

impl Library {
    pub fn name(&self) -> String {
        format!("lib{}", self.stem)
    }

    /// The one that the bindings will find, in the order in which they look; from where no loader looks it is loaded
    /// first, and then found by its name.
    pub fn open(&self) -> Option<Handle> {
        let names = cudarc::get_lib_name_candidates(self.stem);
        let mut paths = places().flat_map(|place| {
            let path = |name: &String| place.join(name);
            names.iter().map(path).collect::<Vec<_>>()
        });
        paths.find_map(|path| Handle::open(&path).ok())
    }

    /// The first function that it lacks.
    pub fn missing_in(&self, handle: Handle) -> Option<&'static str> {
        let lacks = |symbol: &&str| handle.address(symbol).is_none();
        self.symbols.iter().copied().find(lacks)
    }

    /// Its file.
    pub fn file(&self, handle: Handle) -> String {
        let known = self
            .symbols
            .iter()
            .find_map(|symbol| handle.file_of(symbol));
        known.unwrap_or_else(|| self.name())
    }
}

/// The CUDA that a library belongs to, by its first number, and in full.
pub type Release = (u32, String);

/// A library that comes with CUDA, not with the driver: there may be several, and not all fit the driver.
pub struct Toolkit {
    library: Library,
    /// How the file begins that it asks its loader for by name alone: such a one lies beside it, where no loader
    /// would look, so it is loaded before.
    companion: &'static str,
    release: fn(Handle) -> Option<Release>,
    chosen: OnceLock<Handle>,
}

/// The oldest CUDA that is looked for, and the newest one besides the driver's own.
const OLDEST: u32 = 11;
const NEWEST: u32 = 13;

impl Toolkit {
    pub const fn new(
        library: Library,
        companion: &'static str,
        release: fn(Handle) -> Option<Release>,
    ) -> Toolkit {
        Toolkit {
            library,
            companion,
            release,
            chosen: OnceLock::new(),
        }
    }

    /// A function of the chosen library.
    /// # Safety
    /// `F` is the function's type.
    pub unsafe fn function<F: Copy>(&self, symbol: &str) -> F {
        let chosen = self.chosen.get();
        // SAFETY: the caller's; what is chosen is never closed.
        let function = chosen.and_then(|handle| unsafe { handle.function(symbol) });
        function.unwrap_or_else(|| panic!("{symbol} was looked for before anything was opened"))
    }

    /// Where the chosen library lies.
    pub fn file(&self) -> String {
        let chosen = self.chosen.get();
        chosen.map_or_else(|| self.library.name(), |&handle| self.library.file(handle))
    }

    /// Takes the first library that can be used with the driver, or says why none can: one of a newer CUDA makes
    /// kernels that the driver refuses, or has no others, and says no more than "not initialised".
    pub fn choose(&self, driver: u32) -> Result<(), String> {
        let mut why = None;
        let names = self.names(driver);
        for names in names {
            for place in places() {
                for name in &names {
                    match self.examine(&place.join(name), driver) {
                        Ok(handle) => {
                            self.chosen.get_or_init(|| handle);
                            return Ok(());
                        }
                        Err(unfit) => why = why.or(unfit),
                    }
                }
            }
        }
        Err(why.unwrap_or_else(|| format!("{} was not found", self.library.name())))
    }

    /// Names of what fits the driver; then, to say what there is, of what does not.
    fn names(&self, driver: u32) -> [Vec<String>; 2] {
        let plain = format!("{}.so", self.library.name());
        let of = |major: u32| format!("{plain}.{major}");
        let fitting = (OLDEST..=driver / 1000).rev().map(of);
        let newer = (driver / 1000 + 1..=NEWEST).map(of);
        [fitting.chain([plain.clone()]).collect(), newer.collect()]
    }

    /// A library that can be used; else why not, where there is one.
    fn examine(&self, path: &Path, driver: u32) -> Result<Handle, Option<String>> {
        let is_file = path.parent().is_some_and(|dir| dir != Path::new(""));
        if is_file {
            let Ok(file) = path.canonicalize() else {
                return Err(None);
            };
            let major = major_of(&file);
            if let Some(major) = major.filter(|&major| major > driver / 1000) {
                return Err(Some(newer(&path.display(), &major, driver)));
            }
            self.open_companions((path, &file), major);
        }
        let handle = Handle::open(path).map_err(|why| is_file.then_some(why))?;
        self.unfit(handle, driver).map_or(Ok(handle), |why| {
            handle.close();
            Err(Some(why))
        })
    }

    fn unfit(&self, handle: Handle, driver: u32) -> Option<String> {
        let path = self.library.file(handle);
        if let Some(symbol) = self.library.missing_in(handle) {
            return Some(format!("{path} has no {symbol}"));
        }
        match (self.release)(handle) {
            Some((major, shown)) if major > driver / 1000 => Some(newer(&path, &shown, driver)),
            Some(_) => None,
            None => Some(format!("{path} does not tell its version")),
        }
    }

    /// From where the library itself lies, and from where its name was found.
    fn open_companions(&self, (path, file): (&Path, &Path), major: Option<u32>) {
        let begins = match major {
            Some(major) => format!("{}.{major}", self.companion),
            None => self.companion.to_owned(),
        };
        for dir in [file, path].into_iter().filter_map(Path::parent) {
            for entry in entries(dir) {
                let name = entry.file_name().unwrap_or_default().to_string_lossy();
                if name.starts_with(&begins) {
                    let _ = Handle::open(&entry);
                }
            }
        }
    }
}

fn newer(path: &dyn std::fmt::Display, release: &dyn std::fmt::Display, driver: u32) -> String {
    format!(
        "{path} is of CUDA {release} and the driver of CUDA {}",
        show_version(driver)
    )
}

/// Wherever the loader looks, then directories; these are only listed where they are needed.
fn places() -> impl Iterator<Item = PathBuf> {
    once(PathBuf::new()).chain(once_with(directories).flatten())
}

/// 13 of "libcublas.so.13.1.0.3".
fn major_of(file: &Path) -> Option<u32> {
    let name = file.file_name()?.to_string_lossy().into_owned();
    let (_, version) = name.split_once(".so.")?;
    version.split('.').next()?.parse().ok()
}

/// Windows' driver under WSL, toolkits, and the nvidia packages of the active Python environment, else of the
/// Python in the path: images often have them beside a Python that no environment names.
fn directories() -> Vec<PathBuf> {
    let mut dirs = vec![PathBuf::from("/usr/lib/wsl/lib")];
    for variable in ["CUDA_PATH", "CUDA_HOME"] {
        dirs.extend(std::env::var_os(variable).map(|home| PathBuf::from(home).join("lib64")));
    }
    dirs.push("/usr/local/cuda/lib64".into());
    dirs.push("/opt/cuda/lib64".into());
    for home in ["VIRTUAL_ENV", "CONDA_PREFIX"]
        .into_iter()
        .filter_map(std::env::var_os)
    {
        let lib = PathBuf::from(home).join("lib");
        dirs.push(lib.clone());
        dirs.extend(python_packages(&lib));
    }
    for lib in python_libs() {
        dirs.extend(python_packages(&lib));
    }
    dirs
}

/// Directories that hold pythonX.Y: of the Pythons in the path, also Debian's under local, and the user's.
fn python_libs() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let bins = std::env::split_paths(&path).filter(|bin| bin.join("python3").exists());
    let prefixes = bins.filter_map(|bin| Some(bin.parent()?.to_owned()));
    let of_prefix = |prefix: PathBuf| ["lib", "local/lib"].map(|lib| prefix.join(lib));
    let mut libs: Vec<PathBuf> = prefixes.flat_map(of_prefix).collect();
    libs.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/lib")));
    libs
}

/// Libraries of the nvidia packages under `lib`: "cublas/lib" of those for CUDA 12, "cu13/lib" of those for 13.
fn python_packages(lib: &Path) -> Vec<PathBuf> {
    let pythons = subdirectories(lib).into_iter();
    let sites = pythons.flat_map(|python| {
        ["site-packages/nvidia", "dist-packages/nvidia"].map(|site| python.join(site))
    });
    let packages = sites.flat_map(|site| subdirectories(&site));
    packages.map(|package| package.join("lib")).collect()
}

fn subdirectories(dir: &Path) -> Vec<PathBuf> {
    let all = entries(dir).into_iter();
    all.filter(|path| path.is_dir()).collect()
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let mut paths: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    paths.sort();
    paths
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOTHING: Library = Library {
        stem: "loadmaster_no_such_library",
        symbols: &["no_such_function"],
    };

    #[test]
    fn what_is_not_there_is_absent_and_no_panic() {
        assert!(NOTHING.open().is_none());
        let toolkit = Toolkit::new(NOTHING, "libnone.so", |_| None);
        let why = toolkit.choose(12_080).expect_err("nothing");
        assert_eq!(why, "libloadmaster_no_such_library was not found");
        let c = Handle::open(Path::new("libc.so.6")).expect("everywhere");
        assert_eq!(NOTHING.missing_in(c), Some("no_such_function"));
        let known = Library {
            stem: "c",
            symbols: &["no_such_function", "malloc"],
        };
        assert!(known.file(c).contains("libc.so"));
    }

    #[test]
    fn names_that_fit_the_driver_come_first() {
        let toolkit = Toolkit::new(NOTHING, "libnone.so", |_| None);
        let ends = |driver| {
            let names = toolkit.names(driver);
            names.map(|names| {
                let ends = names.iter().map(|n| n.rsplit_once('.').map_or("", |n| n.1));
                ends.collect::<Vec<_>>().join(" ")
            })
        };
        assert_eq!(ends(12_080), ["12 11 so", "13"]);
        assert_eq!(ends(13_000), ["13 12 11 so", ""]);
        assert_eq!(ends(14_020), ["14 13 12 11 so", ""]);
    }

    #[test]
    fn versions_are_read_off_names() {
        let of = |name: &str| major_of(Path::new(name));
        assert_eq!(of("/usr/lib/libcublas.so.13.1.0.3"), Some(13));
        assert_eq!(of("/usr/lib/libnvrtc.so.11.2"), Some(11));
        assert_eq!(of("/usr/lib/libcublas.so"), None);
    }
}
