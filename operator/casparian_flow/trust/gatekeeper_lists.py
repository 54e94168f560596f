"""What the Gatekeeper lets plugins import, call and name. docs/trust.md explains the choices."""

from collections.abc import Mapping
from enum import StrEnum


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


class Profile(StrEnum):
    """How much a plugin may do by the Gatekeeper's rules."""

    STRICT = "strict"
    """Libraries read the file that the plugin is handed; nothing else touches files."""
    STANDARD = "standard"
    """As strict, but the plugin may open files itself, for reading."""
    OFF = "off"
    """Nothing is checked; the sandbox alone stands."""


DEFAULT_WHITELIST = frozenset(
    {"pandas", "pyarrow", "numpy", "sqlalchemy", "pydantic", "openpyxl", "pypdf"}
)
"""Libraries that a new ledger lists in cf_library_whitelist, by the name they are imported as."""

SDK = "casparian_flow.sdk"
SDK_NAMES = frozenset(
    {
        "BATCH_BYTES",
        "BATCH_ROWS_MAX",
        "BasePlugin",
        "FileEvent",
        "PermanentError",
        "PluginContext",
        "PluginError",
        "PluginMetadata",
        "TransientError",
        "record_batches",
    }
)

_STRICT_STDLIB = _words("""
    __future__ abc array ast base64 binascii bisect bz2 calendar cmath codecs collections
    collections.abc colorsys configparser contextlib copy csv dataclasses datetime decimal difflib
    email email.header email.message email.parser email.policy email.utils enum fractions functools
    gzip hashlib heapq hmac html html.entities html.parser io ipaddress itertools json keyword
    logging lzma math mimetypes numbers operator pathlib pprint quopri random re reprlib secrets
    statistics string struct textwrap time tomllib traceback types typing unicodedata urllib
    urllib.parse uuid warnings xml xml.etree xml.etree.ElementTree zlib zoneinfo
    """)

STDLIB: Mapping[Profile, frozenset[str]] = {
    Profile.STRICT: _STRICT_STDLIB,
    Profile.STANDARD: _STRICT_STDLIB
    | _words("concurrent concurrent.futures queue sqlite3 tarfile tempfile threading zipfile"),
    Profile.OFF: frozenset(),
}
"""Modules of the standard library that may be imported, each by its full name."""

MEMBERS: Mapping[str, frozenset[str]] = {
    "ast": frozenset({"literal_eval"}),
    "casparian_flow": frozenset({"sdk"}),
    SDK: SDK_NAMES,
    "concurrent": frozenset({"futures"}),
    "concurrent.futures": frozenset({"ThreadPoolExecutor", "as_completed", "wait", "Future"}),
    "logging": _words("""
        CRITICAL DEBUG ERROR INFO NOTSET WARNING Formatter Logger LoggerAdapter NullHandler
        StreamHandler basicConfig critical debug error exception getLevelName getLogger info log
        warning
        """),
    "pathlib": frozenset({"PurePath", "PurePosixPath", "PureWindowsPath"}),
    "traceback": frozenset({"format_exc", "format_exception", "print_exc", "print_exception"}),
    "types": frozenset({"GenericAlias", "MappingProxyType", "NoneType", "SimpleNamespace"}),
    "urllib": frozenset({"parse"}),
    "xml": frozenset({"etree"}),
}
"""Modules of which only these members may be used."""

OPENERS = _words("codecs.open io.FileIO io.open io.open_code")
"""Other names for `open`."""

ARCHIVE_OPENERS = _words("bz2.BZ2File bz2.open gzip.GzipFile gzip.open lzma.LZMAFile lzma.open")
"""Openers of compressed files; the standard profile lets them through."""

DENIED = _words("""
    dataclasses.make_dataclass json.tool numpy.ctypeslib numpy.distutils numpy.f2py
    numpy.testing pandas.compat pandas.core.computation pandas.io.clipboard pandas.io.clipboards
    pandas.io.common pandas.io.pickle pandas.io.pytables pydantic.ImportString pydantic.PyObject
    pydantic.create_model pydantic.plugin pydantic.utils pydantic.v1 pyarrow.cffi pyarrow.cuda
    pyarrow.deserialize pyarrow.flight pyarrow.fs pyarrow.hdfs pyarrow.jvm pyarrow.serialize
    sqlalchemy.testing sqlalchemy.util string.Formatter types.CodeType types.FunctionType
    typing.ForwardRef typing.evaluate_forward_ref typing.get_type_hints uuid.getnode uuid.uuid1
    """)
"""Members of allowed modules that lead around the other rules: pickles, networks, raw memory,
text that becomes code."""

CODE_BUILTINS = frozenset({"eval", "exec", "compile", "__build_class__"})
ATTRIBUTE_BUILTINS = frozenset({"getattr", "setattr", "delattr", "hasattr"})
ATTRIBUTE_MAKERS = frozenset({"operator.attrgetter", "operator.methodcaller"})
SCOPE_BUILTINS = frozenset({"globals", "locals", "vars", "breakpoint"})

MODULE_ATTRIBUTES = _words("""
    os sys subprocess builtins importlib ctypes socket pickle cPickle marshal shutil
    multiprocessing posix nt pty runpy pkgutil socketserver ssl urllib ftplib smtplib shelve
    tempfile cloudpickle asyncio mmap fcntl gc imp zipimport
    """)
"""Modules that libraries happen to hold in their names space: `pandas.io.common.os`."""

ATTRIBUTES = _words("""
    CDLL HDFStore LoadLibrary Popen PyExtensionType _export_to_c _import_from_c
    _import_from_c_device as_strided check_call check_output ctypeslib dlopen enable_load_extension
    exec_module execv execve f2py fdopen foreign_buffer import_module load_extension load_module
    open_code popen read_clipboard read_gbq read_hdf read_pickle to_clipboard to_hdf to_pickle
    """)
"""Attributes that are refused on anything, since nothing harmless is called so."""

FRAME_ATTRIBUTES = _words("""
    ag_code ag_frame co_code co_consts cr_await cr_code cr_frame f_back f_builtins f_code f_globals
    f_locals func_code func_globals gi_code gi_frame gi_yieldfrom mro tb_frame tb_next
    """)

_OPERATORS = _words(
    """
    abs add aenter aexit aiter and anext await bool bytes call ceil complex contains delitem divmod
    enter eq exit float floor floordiv format ge getitem gt hash iadd iand ifloordiv ilshift imod
    imul index init int invert ior ipow irshift isub iter itruediv ixor le len length_hint lshift
    lt matmul missing mod mul ne neg new next or pos post_init pow radd rand repr reversed rmul ror
    round rshift rsub rtruediv setitem str sub truediv trunc xor
    """
)
PLAIN_DUNDERS = frozenset(f"__{word}__" for word in _OPERATORS) | frozenset(
    {"__name__", "__members__", "__version__", "__slots__", "__class_getitem__"}
)
"""Special names that may be used and defined; every other one leads into the interpreter."""

MODULE_DUNDERS = frozenset(
    {"__all__", "__author__", "__copyright__", "__debug__", "__license__", "__version__"}
)

_TELLING = _words(
    """
    annotations base bases builtins build_class cached cause class closure code context defaults
    delattr dict file func getattr getattribute globals import init_subclass kwdefaults loader
    match_args module mro objclass package path reduce reduce_ex self set_name setattr setstate spec
    subclasses subclasshook traceback wrapped
    """
)
TELLING_DUNDERS = frozenset(f"__{word}__" for word in _TELLING)
"""Special names that text in a plugin has no reason to spell."""

PLAIN_METACLASSES = frozenset({"abc.ABCMeta", "enum.EnumMeta", "enum.EnumType"})

READERS = _words("""
    FileSource OSFile ParquetDataset ParquetFile create_memory_map fromfile genfromtxt input_stream
    loadtxt memmap memory_map open_csv open_json output_stream read_csv read_excel read_feather
    read_fwf read_html read_json read_metadata read_orc read_parquet read_sas read_schema read_spss
    read_stata read_table read_xml load_workbook
    """)
"""Functions of libraries that open what their first argument names."""
READER_KEYWORDS = frozenset({"path", "source", "filepath_or_buffer", "path_or_buf", "io", "where"})
NETWORK_KEYWORDS = frozenset({"storage_options", "filesystem"})
