package tree

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// memFile is an upload's file in memory.
type memFile struct{ b []byte }

func (m *memFile) Write(p []byte) (int, error) { m.b = append(m.b, p...); return len(p), nil }
func (m *memFile) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(m.b).ReadAt(p, off)
}

var testLimits = Limits{Unpacked: 1 << 20, Entries: 1000}

// th is a header with content; Size follows from body unless set.
type th struct {
	tar.Header
	body string
}

func reg(name, body string) th {
	return th{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, body}
}
func dirE(name string) th { return th{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: 0o755}, ""} }
func sym(name, to string) th {
	return th{tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: to}, ""}
}
func hard(name, to string) th {
	return th{tar.Header{Name: name, Typeflag: tar.TypeLink, Linkname: to}, ""}
}
func odd(name string, flag byte) th { return th{tar.Header{Name: name, Typeflag: flag}, ""} }

func makeTar(t testing.TB, entries ...th) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.Header
		h.Size = int64(len(e.body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("WriteHeader(%q): %v", h.Name, err)
		}
		io.WriteString(w, e.body)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// block is one raw header, for what archive/tar will not write.
func block(t testing.TB, name string, flag byte, size string) []byte {
	t.Helper()
	b := make([]byte, 512)
	copy(b, name)
	copy(b[100:], "0000644\x00")
	copy(b[124:], size)
	copy(b[136:], "00000000000\x00")
	b[156] = flag
	return checksum(b)
}

func checksum(b []byte) []byte {
	copy(b[148:], "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b[148:], fmt.Sprintf("%06o\x00 ", sum))
	return b
}

var end = make([]byte, 1024)

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func gz(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zst(t testing.TB, b []byte) []byte {
	t.Helper()
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	return e.EncodeAll(b, nil)
}

type zf struct {
	name, body string
	edit       func(*zip.FileHeader)
}

func makeZip(t testing.TB, files ...zf) []byte {
	t.Helper()
	var b bytes.Buffer
	w := zip.NewWriter(&b)
	for _, f := range files {
		h := &zip.FileHeader{Name: f.name, Method: zip.Deflate}
		h.SetMode(0o644)
		if f.edit != nil {
			f.edit(h)
		}
		fw, err := w.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(fw, f.body)
	}
	w.Close()
	return b.Bytes()
}

// oldSparse is a GNU sparse header that claims size and holds one piece of data.
func oldSparse(t testing.TB, name, size, offset string, data []byte) []byte {
	t.Helper()
	b := block(t, name, 'S', fmt.Sprintf("%011o\x00", len(data)))
	copy(b[257:], "ustar  \x00")
	copy(b[386:], offset+"\x00")
	copy(b[398:], fmt.Sprintf("%011o\x00", len(data)))
	copy(b[483:], size+"\x00")
	return join(checksum(b), data, make([]byte, (512-len(data)%512)%512))
}

func TestReceiveAccepts(t *testing.T) {
	project := makeTar(t, dirE("./"), reg("./rai_build.yml", "rai: {}\n"), reg("./src/a.cu", "abc"))
	want := Summary{Entries: 3, Bytes: 11, Wanted: []byte("rai: {}\n"), Found: true}
	tests := []struct {
		name, format string
		in           []byte
		want         Summary
	}{
		{"tar", "tar", project, want},
		{"gzip", "tar.gz", gz(t, project), want},
		{"gzip members", "tar.gz", join(gz(t, project[:700]), gz(t, project[700:])), want},
		{"zstd", "tar.zst", zst(t, project), want},
		{"zstd frames", "tar.zst", join([]byte("\x50\x2a\x4d\x18\x02\x00\x00\x00xx"), zst(t, project[:700]), zst(t, project[700:])), want},
		{"lone zero block", "tar", project[:len(project)-512], want},
		{"padded", "tar", join(project, make([]byte, 10240)), want},
		{"no name", "tar", makeTar(t, reg("a", "x")), Summary{Entries: 1, Bytes: 1}},
		{"nested", "tar", makeTar(t, dirE("proj/"), reg("._proj", "mac"), reg("proj/rai_build.yml", "x")),
			Summary{Entries: 3, Bytes: 4, Nested: "proj"}},
		{"nested beside", "tar", makeTar(t, reg("proj/rai_build.yml", "x"), reg("b", "")), Summary{Entries: 3, Bytes: 1}},
		{"deeper", "tar", makeTar(t, reg("a/b/rai_build.yml", "x")), Summary{Entries: 3, Bytes: 1}},
		{"linked", "tar", makeTar(t, sym("rai_build.yml", "x")), Summary{Entries: 1, Linked: true}},
		{"last wins", "tar", makeTar(t, reg("rai_build.yml", "1"), reg("./rai_build.yml", "22")),
			Summary{Entries: 2, Bytes: 3, Found: true, Wanted: []byte("22")}},
		{"odd entries", "tar", makeTar(t, sym("abs", "/etc"), sym("up", "../../x"), reg("f", "1"), hard("h", "./f"), hard("h", "h"),
			hard("f", "f"), dirE("empty"), odd("g", tar.TypeCont)), Summary{Entries: 8, Bytes: 1}},
		{"git", "tar", makeTar(t, th{tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header",
			PAXRecords: map[string]string{"comment": "abc"}}, ""}, reg("a", "")), Summary{Entries: 1}},
		{"label", "tar", join(block(t, "backup", 'V', "00000000000\x00"), makeTar(t, reg("a", ""))), Summary{Entries: 1}},
		{"V7", "tar", join(block(t, "old", 0, "00000000000\x00"), end), Summary{Entries: 1}},
		{"V7 folder", "tar", join(block(t, "old/", 0, "00000000000\x00"), block(t, "old/x", '0', "00000000000\x00"), end), Summary{Entries: 2}},
		{"link becomes folder", "tar", makeTar(t, sym("d", "/etc"), dirE("d"), reg("d/x", "")), Summary{Entries: 3}},
		{"long", "tar", makeTar(t, reg(strings.Repeat("a/", 255)+"b", ""), reg(strings.Repeat("n", 255), "")), Summary{Entries: 257}},
		{"not UTF-8", "tar", makeTar(t, reg("caf\xe9", "")), Summary{Entries: 1}},
		{"sparse", "tar", join(oldSparse(t, "s", "00001000000", "00000777000", []byte(strings.Repeat("d", 512))), end),
			Summary{Entries: 1, Bytes: 1 << 18}},
		{"nothing in it", "tar", end, Summary{}},
		{"zip", "zip", makeZip(t, zf{"rai_build.yml", "rai: {}\n", nil}, zf{"src/a.cu", "abc", nil}), want},
		{"zip of Windows", "zip", makeZip(t, zf{`proj\`, "", dos}, zf{`proj\rai_build.yml`, "x", dos}), Summary{Entries: 2, Bytes: 1, Nested: "proj"}},
		{"zip link", "zip", makeZip(t, zf{"l", "/etc/passwd", func(h *zip.FileHeader) { h.SetMode(fs.ModeSymlink | 0o777) }}), Summary{Entries: 1}},
		{"empty zip", "zip", makeZip(t), Summary{}},
		{"empty", "", nil, Summary{Empty: true}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			tt.want.Format = tt.format
			var f memFile
			got, err := Receive(bytes.NewReader(tt.in), &f, "rai_build.yml", testLimits)
			if err != nil {
				t.Fatalf("Receive = %v (%+v)", err, err)
			}
			if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", tt.want) {
				t.Errorf("Receive = %+v, want %+v", got, tt.want)
			}
			if !bytes.Equal(f.b, tt.in) {
				t.Errorf("Receive kept %d bytes, want the %d that came", len(f.b), len(tt.in))
			}
			holds(t, f.b, testLimits)
		})
	}
}

func dos(h *zip.FileHeader) { h.CreatorVersion, h.ExternalAttrs = 20, 0 }

// holds checks the law of this package: what was received can be normalised, that
// is accepted again, and unpacks into the folder and nowhere else.
func holds(t testing.TB, upload []byte, lim Limits) string {
	t.Helper()
	var plain bytes.Buffer
	if err := Normalise(&plain, bytes.NewReader(upload), int64(len(upload)), lim); err != nil {
		t.Fatalf("Normalise of what Receive accepted = %v", err)
	}
	if _, err := Check(bytes.NewReader(plain.Bytes()), "", lim); err != nil {
		t.Fatalf("Check of what Normalise wrote = %v", err)
	}
	around := t.TempDir()
	dir := filepath.Join(around, "in")
	os.Mkdir(dir, 0o755)
	if err := Unpack(dir, &plain); err != nil {
		t.Fatalf("Unpack of what Normalise wrote = %v", err)
	}
	if names, err := os.ReadDir(around); err != nil || len(names) != 1 {
		t.Fatalf("Unpack wrote beside its folder: %v, %v", names, err)
	}
	return dir
}

func TestRefuses(t *testing.T) {
	project := makeTar(t, reg("a", strings.Repeat("x", 5000)), reg("b", ""))
	tests := []struct {
		name string
		in   []byte
		want string // in the error's text
		big  bool
	}{
		{"absolute", makeTar(t, reg("/etc/passwd", "")), `entry "/etc/passwd": name is absolute`, false},
		{"up", makeTar(t, reg("../x", "")), `entry "../x": name leaves the folder`, false},
		{"up inside", makeTar(t, reg("a/../../x", "")), "leaves the folder", false},
		{"empty name", join(block(t, "", '0', "00000000000\x00"), end), "name is empty", false},
		{"terminal", makeTar(t, reg("../\x1b[2J\u202e", "")), `entry "../\x1b[2J\u202e": `, false},
		{"long name", makeTar(t, reg(strings.Repeat("abc/", 1100)+"x", "")), "longer than 4096", false},
		{"long part", makeTar(t, reg(strings.Repeat("a", 256), "")), "longer than 255", false},
		{"deep", makeTar(t, reg(strings.Repeat("a/", 256)+"b", "")), "256 folders deep", false},
		{"through link", makeTar(t, sym("d", "/tmp"), reg("d/x", "")), "below a link", false},
		{"through link, higher", makeTar(t, sym("a/d", "/tmp"), reg("a//d/./b/x", "")), "below a link", false},
		{"folder through link", makeTar(t, sym("d", "/tmp"), dirE("d/x")), "below a link", false},
		{"link through link", makeTar(t, sym("d", "."), sym("d/x", "y")), "below a link", false},
		{"below file", makeTar(t, reg("d", ""), reg("d/x", "")), "below a file", false},
		{"file for folder", makeTar(t, reg("d/x", ""), reg("d", "")), "place of a folder", false},
		{"link for folder", makeTar(t, dirE("d"), sym("d", "/tmp"), reg("d/x", "")), "place of a folder", false},
		{"hard link out", makeTar(t, hard("h", "/etc/shadow")), "out of the folder", false},
		{"hard link up", makeTar(t, hard("h", "../x")), "out of the folder", false},
		{"hard link later", makeTar(t, hard("h", "x"), reg("x", "")), "no earlier file", false},
		{"hard link to link", makeTar(t, sym("l", "/etc/shadow"), hard("h", "l")), "no earlier file", false},
		{"hard link to replaced", makeTar(t, reg("l", ""), sym("l", "/etc/shadow"), hard("h", "l")), "no earlier file", false},
		{"hard link to folder", makeTar(t, dirE("d"), hard("h", "d")), "no earlier file", false},
		{"hard link through link", makeTar(t, sym("d", "/etc"), hard("h", "d/shadow")), "no earlier file", false},
		{"empty link", makeTar(t, sym("l", "")), "link to no valid name", false},
		{"device", makeTar(t, odd("d", tar.TypeChar)), "is a device", false},
		{"block device", makeTar(t, odd("d", tar.TypeBlock)), "is a device", false},
		{"FIFO", makeTar(t, odd("d", tar.TypeFifo)), "is a FIFO", false},
		{"multi-volume", join(block(t, "m", 'M', "00000000000\x00"), end), "another volume", false},
		{"dump folder", join(block(t, "m", 'D', "00000000000\x00"), end), "incremental", false},
		{"unknown", join(block(t, "m", 'Q', "00000000000\x00"), end), "unknown kind 'Q'", false},
		{"file for root", makeTar(t, reg(".", "")), "folder itself", false},
		{"slash file", join(block(t, "m/", '0', "00000000001\x00"), end, end), "name of a folder", false},
		{"too big", makeTar(t, reg("a", strings.Repeat("x", 1<<20)), reg("b", "1")), "more than 1 MiB", true},
		{"8 TB", join(block(t, "a", '0', "\x80\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00"), end), "more than 1 MiB", true},
		{"sparse 8 TB", join(oldSparse(t, "a", "\x80\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00", "00000000000", nil), end), "more than 1 MiB", true},
		{"sparse that lies", join(oldSparse(t, "a", "00000000100", "00000000000", []byte(strings.Repeat("d", 512))), end), "", false},
		{"many", makeTar(t, many(1001)...), "more than 1000 files", true},
		{"many implied", makeTar(t, deep(30)...), "more than 1000 files", true},
		{"headers only", gz(t, bytes.Repeat(block(t, "pax", 'x', "00000000000\x00"), 200<<10)), "headers and padding", true},
		{"wanted too big", makeTar(t, reg("want", strings.Repeat("x", 1<<20)+"1"))[:1<<20+2048], "more than 1 MiB", true},
		{"padding", gz(t, join(project, make([]byte, 80<<20))), "follows the end", true},
		{"no end", project[:len(project)-1024], "cut short", false},
		{"no end, zeros before", makeTar(t, reg("z", strings.Repeat("\x00", 512)))[:1024], "cut short", false},
		{"cut in file", project[:3000], "cut short", false},
		{"cut in header", project[:700], "cut short", false},
		{"cut in gzip", gz(t, project)[:100], "cut short", false},
		{"cut in gzip trailer", gz(t, project)[:len(gz(t, project))-3], "cut short", false},
		{"cut in zstd", zst(t, project)[:30], "cut short", false},
		{"gzip checksum", flip(gz(t, project), 6), "damaged", false},
		{"garbage", join(project[:512*12], bytes.Repeat([]byte("Q"), 1024)), "damaged", false},
		{"gzip of text", gz(t, []byte("hello")), "not a tar", false},
		{"gzip of nothing", gz(t, nil), "nothing was compressed", false},
		{"gzip of zip", gz(t, makeZip(t)), "not a tar", false},
		{"xz", []byte("\xfd7zXZ\x00..."), "this is xz", false},
		{"bzip2", []byte("BZh91AY"), "this is bzip2", false},
		{"7z", []byte("7z\xbc\xaf\x27\x1c"), "this is 7z", false},
		{"rar", []byte("Rar!\x1a"), "this is rar", false},
		{"PDF", []byte("%PDF-1.4"), "a PDF", false},
		{"HTML", []byte("\n<!DOCTYPE html>"), "web page", false},
		{"text", []byte("rai:\n  version: 0.2\n"), "plain text", false},
		{"noise", []byte("\x01\x02\x03\x90\x00"), "no archive", false},
		{"encrypted zip", patched(t, makeZip(t, zf{"a", "x", nil}), 8, 9), "encrypted", false},
		{"zip method", patched(t, makeZip(t, zf{"a", "x", nil}), 10, 12), "compressed by method 12", false},
		{"zip head alone", makeZip(t, zf{"a", "x", nil})[:20], "cut short", false},
		{"cut zip", cut(makeZip(t, zf{"a", "x", nil}), 30), "cut short", false},
		{"zip up", makeZip(t, zf{"../a", "x", nil}), "leaves the folder", false},
		{"zip up, Windows", makeZip(t, zf{`..\a`, "x", dos}), "leaves the folder", false},
		{"zip absolute", makeZip(t, zf{"/a", "x", nil}), "absolute", false},
		{"zip bomb", makeZip(t, zf{"a", strings.Repeat("0", 2<<20), nil}), "more than 1 MiB", true},
		{"zip device", makeZip(t, zf{"a", "", func(h *zip.FileHeader) { h.SetMode(fs.ModeDevice) }}), "neither file", false},
		{"zip link", makeZip(t, zf{"l", "/tmp", func(h *zip.FileHeader) { h.SetMode(fs.ModeSymlink) }}, zf{"l/x", "", nil}), "below a link", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := Receive(bytes.NewReader(tt.in), &memFile{}, "want", testLimits)
			re, ok := errors.AsType[*RefusedError](err)
			if !ok || !strings.Contains(err.Error(), tt.want) || re.TooBig != tt.big {
				t.Fatalf("Receive = %v (%#v), want a refusal with %q, too big: %v", err, re, tt.want, tt.big)
			}
			if err := Normalise(io.Discard, bytes.NewReader(tt.in), int64(len(tt.in)), testLimits); !refused(err) {
				t.Errorf("Normalise = %v, want a refusal", err)
			}
			if bytes.HasPrefix(tt.in, []byte("PK")) {
				return
			}
			if _, err := Check(bytes.NewReader(tt.in), "want", testLimits); !refused(err) {
				t.Errorf("Check = %v, want a refusal", err)
			}
		})
	}
}

func many(n int) (out []th) {
	for i := range n {
		out = append(out, reg(fmt.Sprint(i), ""))
	}
	return out
}

func deep(n int) (out []th) {
	for i := range n {
		out = append(out, reg(fmt.Sprint(i)+strings.Repeat("/a", 40), ""))
	}
	return out
}

func flip(b []byte, fromEnd int) []byte { b[len(b)-fromEnd] ^= 1; return b }
func cut(b []byte, n int) []byte        { return b[:len(b)-n] }

// patched sets a byte of the last entry in the zip's directory, which is what readers believe.
func patched(t testing.TB, b []byte, at int, to byte) []byte {
	t.Helper()
	i := bytes.LastIndex(b, []byte("PK\x01\x02"))
	if i < 0 {
		t.Fatal("no directory in this zip")
	}
	b[i+at] = to
	return b
}

// An error that is not the sender's must not be told to them as theirs.
func TestErrorsOfOthers(t *testing.T) {
	lost := errors.New("connection lost")
	whole := makeTar(t, reg("a", strings.Repeat("x", 5000)))
	for _, in := range [][]byte{whole, gz(t, whole), zst(t, whole), makeZip(t, zf{"a", "x", nil}), nil} {
		for _, n := range []int{0, len(in) / 2} {
			r := io.MultiReader(bytes.NewReader(in[:n]), &failing{lost})
			if _, err := Receive(r, &memFile{}, "", Limits{}); !errors.Is(err, lost) || refused(err) {
				t.Errorf("Receive cut at %d of %d = %v, want %v", n, len(in), err, lost)
			}
		}
		if in == nil {
			continue
		}
		if _, err := Receive(bytes.NewReader(in), &failing{lost}, "", Limits{}); !errors.Is(err, lost) || refused(err) {
			t.Errorf("Receive to a failing file = %v, want %v", err, lost)
		}
		if err := Normalise(&failing{lost}, bytes.NewReader(in), int64(len(in)), Limits{}); !errors.Is(err, lost) || refused(err) {
			t.Errorf("Normalise to a failing writer = %v, want %v", err, lost)
		}
		if err := Normalise(io.Discard, &failing{lost}, int64(len(in)), Limits{}); !errors.Is(err, lost) || refused(err) {
			t.Errorf("Normalise of a failing file = %v, want %v", err, lost)
		}
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error)          { return 0, f.err }
func (f *failing) Write([]byte) (int, error)         { return 0, f.err }
func (f *failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }

func TestHugeClaimIsRefusedUnread(t *testing.T) {
	head := block(t, "a", '0', "\x80\x00\x00\x00\x00\x00\x08\x00\x00\x00\x00\x00")
	endless := &counting{r: io.MultiReader(bytes.NewReader(head), zeros{})}
	if _, err := Check(endless, "", testLimits); !refused(err) {
		t.Fatalf("Check = %v, want a refusal", err)
	}
	if endless.n > bufSize {
		t.Errorf("Check read %d bytes before it refused, want at most one buffer", endless.n)
	}
}

type counting struct {
	r io.Reader
	n int
}

func (c *counting) Read(p []byte) (int, error) { n, err := c.r.Read(p); c.n += n; return n, err }

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { clear(p); return len(p), nil }

func TestNormalise(t *testing.T) {
	when := time.Unix(1700000000, 0)
	in := makeTar(t, th{tar.Header{Name: "./a//b/./x", Typeflag: tar.TypeReg, Mode: 0o6755, Uid: 7, Uname: "ada", ModTime: when,
		Format: tar.FormatPAX, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "root"}}, "x"},
		hard("h", "./a/b/x"), sym("l", "../up"), reg("old", ""))
	var out bytes.Buffer
	if err := Normalise(&out, bytes.NewReader(in), int64(len(in)), testLimits); err != nil {
		t.Fatal(err)
	}
	var got []string
	tr := tar.NewReader(&out)
	for h, err := tr.Next(); err == nil; h, err = tr.Next() {
		got = append(got, fmt.Sprintf("%c %s>%s %o %d%q %d %d", h.Typeflag, h.Name, h.Linkname, h.Mode, h.Uid, h.Uname, h.ModTime.Unix(), len(h.PAXRecords)))
	}
	want := []string{`0 a/b/x> 755 0"" 1700000000 0`, `1 h>a/b/x 0 0"" 0 0`, `2 l>../up 0 0"" 0 0`, `0 old> 644 0"" 0 0`}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("Normalise wrote\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestSparseIsExpanded(t *testing.T) {
	in := join(oldSparse(t, "s", "00000002000", "00000001000", []byte(strings.Repeat("d", 512))), end)
	dir := holds(t, in, testLimits)
	b, err := os.ReadFile(filepath.Join(dir, "s"))
	if want := strings.Repeat("\x00", 512) + strings.Repeat("d", 512); err != nil || string(b) != want {
		t.Errorf("sparse file unpacked to %q, %v, want 512 zeros and 512 d", b, err)
	}
}

func TestUnpack(t *testing.T) {
	when := time.Unix(1600000000, 0)
	at := func(e th) th { e.ModTime = when; return e }
	in := makeTar(t, at(th{tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o500}, ""}), at(reg("d/x", "1")), at(reg("d/x", "22")),
		hard("h", "d/x"), sym("l", "/nowhere"), reg("l", "now a file"), sym("k", "/nowhere"), dirE("k"), reg("k/in", ""),
		th{tar.Header{Name: "run", Typeflag: tar.TypeReg, Mode: 0o4111}, "#!"}, reg("e/f/g", "deep"), reg("top", ""))
	dir := t.TempDir()
	if err := Unpack(dir, bytes.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"d": "drwx------", "d/x": "-rw-r--r--", "h": "-rw-r--r--", "l": "-rw-r--r--",
		"k": "drwxr-xr-x", "run": "-rwx--x--x", "e/f/g": "-rw-r--r--", "top": "-rw-r--r--"} {
		fi, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if got := fi.Mode().String(); got != want {
			t.Errorf("mode of %s = %s, want %s", name, got, want)
		}
		if strings.HasPrefix(name, "d") && !fi.ModTime().Equal(when) {
			t.Errorf("time of %s = %v, want %v", name, fi.ModTime(), when)
		}
	}
	x, _ := os.Stat(filepath.Join(dir, "d/x"))
	h, _ := os.Stat(filepath.Join(dir, "h"))
	if !os.SameFile(x, h) || x.Size() != 2 {
		t.Errorf("h is not d/x, or its last contents lost: size %d", x.Size())
	}
}

func TestUnpackFollowsNoLinkThatWasThere(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	if err := os.Symlink(outside, filepath.Join(dir, "d")); err != nil {
		t.Fatal(err)
	}
	if err := Unpack(dir, bytes.NewReader(makeTar(t, reg("d/x", "")))); err == nil {
		t.Error("Unpack through a link = nil, want an error")
	}
	if names, _ := os.ReadDir(outside); len(names) != 0 {
		t.Errorf("Unpack wrote outside: %v", names)
	}
}

func TestExtract(t *testing.T) {
	in := makeTar(t, reg("a", "1"), reg("d/x", "22"), hard("d/y", "d/x"), hard("d2", "a"), sym("d/l", "q"))
	tests := []struct {
		path, want string
		found      bool
		err        string
	}{
		{"d", "d/x d/y d/l", true, ""},
		{"./d/x", "d/x", true, ""},
		{".", "a d/x d/y d2 d/l", true, ""},
		{"nope", "", false, ""},
		{"d2", "", false, "another name"},
		{"../x", "", false, "leaves"},
	}
	for _, tt := range tests {
		var out bytes.Buffer
		found, err := Extract(&out, bytes.NewReader(zst(t, in)), tt.path)
		if tt.err != "" {
			if !refused(err) || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("Extract(%q) = %v, want %q", tt.path, err, tt.err)
			}
			continue
		}
		var names []string
		tr := tar.NewReader(&out)
		for h, err := tr.Next(); err == nil; h, err = tr.Next() {
			names = append(names, h.Name)
		}
		if got := strings.Join(names, " "); got != tt.want || found != tt.found || err != nil {
			t.Errorf("Extract(%q) = %q, %v, %v, want %q, %v", tt.path, got, found, err, tt.want, tt.found)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 bytes", 1023: "1023 bytes", 1 << 10: "1 KiB", 3 << 29: "1.5 GiB", 10 << 30: "10 GiB"} {
		if got := Size(n); got != want {
			t.Errorf("Size(%d) = %q, want %q", n, got, want)
		}
	}
}

// need skips without the tool, except in raid's own CI, where it must be.
func need(t *testing.T, tool string) {
	t.Helper()
	if _, err := exec.LookPath(tool); err == nil {
		return
	}
	if os.Getenv("RAID_CI") == "1" {
		t.Fatalf("%s is not installed", tool)
	}
	t.Skipf("%s is not installed", tool)
}

// Archives of the tools people use.
func TestRealTools(t *testing.T) {
	src := t.TempDir()
	long := strings.Repeat("long-name-", 15)
	for name, body := range map[string]string{"rai_build.yml": "rai: {}\n", "src/main.cu": "int main;", "src/" + long + "/" + long: "x", "sp ace": "", "na\tme\xff": "1"} {
		p := filepath.Join(src, name)
		os.MkdirAll(filepath.Dir(p), 0o755)
		if err := os.WriteFile(p, []byte(body), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	hole, err := os.Create(filepath.Join(src, "hole"))
	if err != nil {
		t.Fatal(err)
	}
	hole.WriteAt([]byte("end"), 300<<10)
	hole.Close()
	os.Symlink("src/main.cu", filepath.Join(src, "link"))
	os.Link(filepath.Join(src, "sp ace"), filepath.Join(src, "twin"))

	tests := []struct{ name, tool, script string }{
		{"gnu", "tar", "tar cf - ."},
		{"gnu sparse", "tar", "tar --sparse -cf - ."},
		{"gnu pax sparse", "tar", "tar --format=pax --sparse -cf - ."},
		{"gnu pax sparse 0.1", "tar", "tar --format=pax --sparse --sparse-version=0.1 -cf - ."},
		{"gnu xattrs", "tar", "tar --xattrs --acls --selinux -cf - . 2>/dev/null"},
		{"ustar", "tar", "tar --format=ustar -cf - --exclude='long*' ."},
		{"v7", "tar", "tar --format=v7 -cf - --exclude='long*' ."},
		{"names twice", "tar", "tar cf - rai_build.yml rai_build.yml src src ."},
		{"volume label", "tar", "tar -V 'my label' -cf - ."},
		{"gzip", "tar", "tar czf - ."},
		{"zstd", "zstd", "tar cf - . | zstd -c"},
		{"zstd long", "zstd", "tar cf - . | zstd -c --long --ultra -22"},
		{"bsdtar", "bsdtar", "bsdtar cf - ."},
		{"bsdtar sparse", "bsdtar", "bsdtar --format pax --read-sparse -cf - ."},
		{"zip", "zip", "zip -q -r -y ../a.zip . && cat ../a.zip && rm ../a.zip"}, // to a pipe it refuses links
		{"git", "git", "git init -q . && git add -A && git -c user.name=a -c user.email=b commit -q -m x && git archive HEAD"},
		{"git zip", "git", "git archive --format=zip HEAD"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			need(t, tt.tool)
			cmd := exec.Command("sh", "-c", tt.script)
			cmd.Dir, cmd.Stderr = src, os.Stderr
			in, err := cmd.Output()
			if err != nil {
				t.Fatalf("%s: %v", tt.script, err)
			}
			var f memFile
			sum, err := Receive(bytes.NewReader(in), &f, "rai_build.yml", Limits{Unpacked: 10 << 20, Entries: 1000})
			if err != nil || string(sum.Wanted) != "rai: {}\n" {
				t.Fatalf("Receive = %+v, %v", sum, err)
			}
			dir := holds(t, f.b, Limits{Unpacked: 10 << 20, Entries: 1000})
			if b, err := os.ReadFile(filepath.Join(dir, "hole")); err != nil || len(b) != 300<<10+3 || string(b[300<<10:]) != "end" {
				t.Errorf("hole has %d bytes, %v, want %d", len(b), err, 300<<10+3)
			}
			if to, err := os.Readlink(filepath.Join(dir, "link")); to != "src/main.cu" || err != nil {
				t.Errorf("link = %q, %v, want src/main.cu", to, err)
			}
		})
	}
}

func FuzzReceive(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		in = mend(in)
		var file memFile
		sum, err := Receive(bytes.NewReader(in), &file, "rai_build.yml", testLimits)
		if err != nil {
			if !refused(err) {
				t.Fatalf("Receive = %v, want a refusal: the reader did not fail", err)
			}
			return
		}
		if sum.Bytes > testLimits.Unpacked || sum.Entries > testLimits.Entries || !bytes.Equal(file.b, in) {
			t.Fatalf("Receive = %+v over the limits, or it kept %d of %d bytes", sum, len(file.b), len(in))
		}
		holds(t, in, testLimits)
	})
}

func FuzzNormalise(f *testing.F) {
	seeds(f)
	f.Fuzz(func(t *testing.T, in []byte) {
		in = mend(in)
		var plain bytes.Buffer
		if err := Normalise(&plain, bytes.NewReader(in), int64(len(in)), testLimits); err != nil {
			if !refused(err) {
				t.Fatalf("Normalise = %v, want a refusal", err)
			}
			return
		}
		var again bytes.Buffer
		if err := Normalise(&again, bytes.NewReader(plain.Bytes()), int64(plain.Len()), testLimits); err != nil {
			t.Fatalf("Normalise of what Normalise wrote = %v", err)
		}
		if !bytes.Equal(plain.Bytes(), again.Bytes()) {
			t.Fatal("Normalise changes what Normalise wrote")
		}
	})
}

// mend puts the checksums of headers right, or the fuzzer would never get past them.
func mend(in []byte) []byte {
	in = bytes.Clone(in)
	for at := 0; at+512 <= len(in); at += 512 {
		if string(in[at+257:at+262]) == "ustar" {
			checksum(in[at : at+512])
		}
	}
	return in
}

func seeds(f *testing.F) {
	project := makeTar(f, dirE("./"), reg("./rai_build.yml", "rai: {}\n"), reg("src/a", "abc"), hard("h", "src/a"), sym("l", ".."),
		reg(strings.Repeat("long/", 40)+"x", "x"))
	f.Add(project)
	f.Add(gz(f, project))
	f.Add(zst(f, project))
	f.Add(makeZip(f, zf{"a/b", "x", nil}, zf{`c\d`, "y", dos}, zf{"l", "..", func(h *zip.FileHeader) { h.SetMode(fs.ModeSymlink) }}))
	f.Add(join(oldSparse(f, "s", "00000002000", "00000001000", []byte(strings.Repeat("d", 512))), end))
	f.Add(makeTar(f, sym("d", "/tmp"), reg("d/x", "")))
	f.Add(makeTar(f, reg("a", "1"), hard("b", "a"), sym("c", "a"), dirE("c"), reg("c/d", "")))
	f.Add(makeTar(f, th{tar.Header{Name: "./\xff", Typeflag: tar.TypeReg, ModTime: time.Unix(1<<35, 1), Format: tar.FormatPAX}, "x"}))
	f.Add([]byte{})
}
